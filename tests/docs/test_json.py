"""The schemas of the documentation are those of what commands print: no key is missing, none too many."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
from blocks import run
from hub_server import Hub, Repository
from schemas import SCHEMAS
from world import enter

RECIPE = "merge_method: ties\nbase_model: org/base\nmodels: [{model: org/math}, {model: org/code}]\n"
ADAPTERS = (
    "version: 1\nmerge_method: ties\nspace: core\nadapters: [{adapter: org/math-lora}, {adapter: org/code-lora}]\n"
)
DEMO = "examples/demo/base examples/demo/finetuned"
COMMANDS = [
    ("extract", f"lrmerge extract {DEMO} -o extracted --rank 4"),
    ("compress", "lrmerge compress org/math-lora -o compressed --rank 4"),
    ("convert", "lrmerge convert style.safetensors -o converted --to peft"),
    ("apply", "lrmerge apply org/base org/math-lora:0.5 -o applied"),
    ("merge", "lrmerge merge models.yaml merged"),
    ("merge", "lrmerge merge adapters.yaml merged-lora"),
    ("plan", "lrmerge plan models.yaml"),
    ("plan", "lrmerge plan adapters.yaml"),
    ("inspect-adapter", "lrmerge inspect org/math-lora"),
    ("inspect-checkpoint", "lrmerge inspect org/base"),
    ("compare", "lrmerge compare org/math-lora org/code-lora"),
    ("push", "lrmerge push org/math-lora me/math --base-model org/base"),
    ("report", "lrmerge report compressed"),
    ("doctor", "lrmerge doctor"),
    ("methods", "lrmerge methods"),
]
ENVELOPE = {"format", "verb", "versions", "inputs", "options"}


@pytest.fixture(scope="module")
def place(world: Path, tmp_path_factory) -> Path:
    folder = enter(world, tmp_path_factory.mktemp("json") / "here")
    (folder / "models.yaml").write_text(RECIPE)
    (folder / "adapters.yaml").write_text(ADAPTERS)
    return folder


@pytest.mark.parametrize(("schema", "command"), COMMANDS, ids=[command for _, command in COMMANDS])
def test_output_has_its_schema(schema: str, command: str, place: Path, served: Hub, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(place)
    served.repositories["org/base"] = Repository({"main": {"config.json": b"{}"}})
    printed = json.loads(run(f"{command} --json"))
    rules = SCHEMAS[schema]()
    jsonschema.Draft202012Validator.check_schema(rules)
    jsonschema.validate(printed, rules)
    if schema in ("extract", "compress", "convert", "apply", "merge"):
        out = command.partition(" -o ")[2].split(" ")[0] or command.split()[-1]
        manifest = json.loads((place / out / "lrmerge.json").read_text())
        assert manifest.keys() >= ENVELOPE | printed.keys()
        for key in ("totals", "seconds", "notes"):
            assert manifest[key] == printed[key]


def test_every_schema_is_used():
    assert {schema for schema, _ in COMMANDS} == SCHEMAS.keys()
