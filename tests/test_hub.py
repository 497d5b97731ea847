"""Models of the Hub: what is fetched, what is sent, what is remembered, and how refusals are told."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from hub_server import TOKEN, Fault, Hub, Repository, hub
from huggingface_hub import close_session
from safetensors.torch import load_file, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedTokenizerFast

from mergekit_lr.adapter import peft_write
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint import hub as remote
from mergekit_lr.checkpoint.parameter import Kind

NEVER = "never fetched"
NOWHERE = "http://127.0.0.1:9"  # the port of discard, where nobody listens
OTHER = {
    "README.md": b"# card",
    "consolidated.safetensors": NEVER.encode(),
    "pytorch_model.bin": NEVER.encode(),
    "original/model.safetensors": NEVER.encode(),
    "onnx/config.json": b"{}",
    "training_args.bin": NEVER.encode(),
    "picture.png": NEVER.encode(),
}


def files(tensors: tiny.Tensors) -> dict[str, bytes]:
    return {"config.json": json.dumps(tiny.CONFIG).encode(), "model.safetensors": save(tensors)}


def pickled(tensors: tiny.Tensors) -> dict[str, bytes]:
    import io

    torch.save(tensors, data := io.BytesIO())
    return {"config.json": json.dumps(tiny.CONFIG).encode(), "pytorch_model.bin": data.getvalue()}


@pytest.fixture
def server() -> Iterator[Hub]:
    base, tuned = tiny.decoder(), tiny.finetuned(tiny.decoder())
    repositories = {
        "org/base": Repository({"main": files(base) | OTHER}),
        "org/finetuned": Repository({"main": files(base), "v1.0": files(tuned), "refs/pr/7": files(tuned)}),
        "org/old": Repository({"main": pickled(tuned) | {"training_args.bin": b"x"}}),
        "org/private": Repository({"main": files(tuned)}, access="private"),
        "org/gated": Repository({"main": files(tuned)}, access="gated"),
        "org/nothing": Repository({"main": {"README.md": b"# nothing"}}),
    }
    with hub(repositories) as running:
        yield running


@pytest.fixture
def run(server, tmp_path, monkeypatch):
    """The command line in this process, with the settings of huggingface_hub as environment variables make them."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache" / "hub"))
    monkeypatch.setattr(constants, "HF_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "cache" / "token"))
    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)

    def run(
        *arguments: object, endpoint: str = server.endpoint, offline: bool = False, token: str = ""
    ) -> tiny.Outcome:
        with monkeypatch.context() as patch:
            patch.setattr(constants, "ENDPOINT", endpoint)
            patch.setattr(
                constants, "HUGGINGFACE_CO_URL_TEMPLATE", endpoint + "/{repo_id}/resolve/{revision}/{filename}"
            )
            patch.setattr(constants, "HF_HUB_OFFLINE", offline)
            if token:
                patch.setenv("HF_TOKEN", token)
            close_session()
            return tiny.lrmerge(*arguments)

    yield run
    close_session()


@pytest.fixture
def process(server, tmp_path):
    """The same in a process of its own, with the environment variables themselves."""

    def process(*arguments: object, **environment: str) -> tiny.Outcome:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.endpoint, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lrmerge", *map(str, arguments)]
        ended = subprocess.run(command, capture_output=True, text=True, env=clean | settings | environment)
        return tiny.Outcome(ended.returncode, ended.stdout, ended.stderr)

    return process


def said(ended: tiny.Outcome, *words: str) -> None:
    """It failed with one line that holds ``words``."""
    assert ended.code == 1, ended
    assert len(ended.err.splitlines()) == 1, ended.err
    assert [word for word in words if word not in ended.err] == [], ended.err


def test_extract_fetches_what_it_needs_once(server, process, tmp_path):
    out = tmp_path / "out"
    ended = process("extract", "org/base", "org/finetuned@v1.0", "-o", out, "-q")
    assert ended.code == 0, ended
    assert server.fetched() == {"config.json", "README.md", "model.safetensors"}
    assert not [path for _, path, _ in server.requests if path.endswith("onnx/config.json")]

    described = json.loads((out / "lrmerge.json").read_text())["inputs"]
    commit = server.repositories["org/finetuned"].commit("v1.0")
    assert described["finetuned"]["ref"] == "org/finetuned@v1.0"
    assert described["finetuned"]["revision"] == commit
    assert described["base"]["revision"] == server.repositories["org/base"].commit("main")
    assert json.loads((out / "adapter_config.json").read_text())["base_model_name_or_path"] == "org/base"

    local = tiny.save(tmp_path / "base", tiny.decoder()), tiny.save(tmp_path / "t", tiny.finetuned(tiny.decoder()))
    assert tiny.lrmerge("extract", *local, "-o", tmp_path / "same", "-q").code == 0
    weights = "adapter_model.safetensors"
    assert (out / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()

    server.requests.clear()
    again = process("extract", "org/base", "org/finetuned@v1.0", "-o", out, "-q", "--overwrite", HF_HUB_OFFLINE="1")
    assert again.code == 0, again
    assert server.requests == []
    assert json.loads((out / "lrmerge.json").read_text())["inputs"]["finetuned"]["revision"] == commit


@pytest.fixture
def large(server) -> int:
    """Two models whose weights are larger than what is asked for at first; the bytes of the tensors of both."""
    base = tiny.decoder(hidden=192)
    tuned = tiny.finetuned(base)
    server.repositories["org/large"] = Repository({"main": files(base)})
    server.repositories["org/large-tuned"] = Repository({"main": sharded(tuned) | OTHER})
    return sum(tensor.nbytes for tensors in (base, tuned) for tensor in tensors.values())


def sharded(tensors: tiny.Tensors) -> dict[str, bytes]:
    """The files of a model in two shards."""
    names = sorted(tensors)
    parts = {"model-00001-of-00002.safetensors": names[::2], "model-00002-of-00002.safetensors": names[1::2]}
    index = {"metadata": {}, "weight_map": {name: file for file, own in parts.items() for name in own}}
    held = {file: save({name: tensors[name] for name in own}) for file, own in parts.items()}
    config = {"config.json": json.dumps(tiny.CONFIG).encode()}
    return config | held | {"model.safetensors.index.json": json.dumps(index).encode()}


def weights_sent(server: Hub) -> int:
    """Bytes of safetensors that clients got."""
    return sum(nbytes for path, nbytes in server.sent if path.endswith(".safetensors"))


def slerp(folder: Path, *models: str) -> Path:
    recipe = {"merge_method": "slerp", "base_model": models[0], "models": [{"model": m} for m in models]}
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"parameters": {"t": 0.5}, "dtype": "bfloat16"}))
    return path


@pytest.mark.parametrize("first", [100_000, 64], ids=["one-request", "two-requests"])
def test_a_plan_asks_for_headers_alone(server, run, tmp_path, large, monkeypatch, first):
    monkeypatch.setattr(remote, "_FIRST", first)
    recipe = slerp(tmp_path, "org/large", "org/large-tuned")
    ended = run("plan", recipe, "--json")
    assert ended.code == 0, ended
    plan = json.loads(ended.out)
    assert plan["download_bytes"] == plan["read_bytes"] == large
    assert len(plan["tensors"]) == len(tiny.decoder())
    assert 0 < weights_sent(server) <= 3 * 100_001 < large / 2
    assert "to download first" in run("plan", recipe).out

    folders = [tiny.save(tmp_path / "base", tiny.decoder(hidden=192))]
    folders.append(tiny.save(tmp_path / "tuned", tiny.finetuned(tiny.decoder(hidden=192)), shards=2))
    local = json.loads(run("plan", slerp(tmp_path, *map(str, folders)), "--json").out)
    assert local["download_bytes"] == 0
    assert local["tensors"] == plan["tensors"]


def test_what_was_planned_is_then_fetched(server, run, tmp_path, large):
    recipe = slerp(tmp_path, "org/large", "org/large-tuned")
    assert run("merge", recipe, tmp_path / "planned", "--dry-run").code == 0
    assert run("merge", recipe, tmp_path / "out", "-q").code == 0
    assert json.loads(run("plan", recipe, "--json").out)["download_bytes"] == 0
    folders = [tiny.save(tmp_path / "base", tiny.decoder(hidden=192))]
    folders.append(tiny.save(tmp_path / "tuned", tiny.finetuned(tiny.decoder(hidden=192))))
    assert run("merge", slerp(tmp_path, *map(str, folders)), tmp_path / "same", "-q").code == 0
    weights = "model.safetensors"
    assert (tmp_path / "out" / weights).read_bytes() == (tmp_path / "same" / weights).read_bytes()


def test_dry_runs_ask_for_headers_alone(server, run, tmp_path, large):
    planned = run("extract", "org/large", "org/large-tuned", "-o", tmp_path / "lora", "--dry-run", "--json")
    assert planned.code == 0, planned
    assert json.loads(planned.out)["download_bytes"] == large
    assert run("extract", "org/large", "org/large-tuned", "-o", tmp_path / "lora", "-q", "--rank", 2).code == 0
    server.repositories["org/later"] = Repository({"main": files(tiny.decoder(hidden=192, seed=3))})
    server.sent.clear()
    planned = run("apply", "org/later", tmp_path / "lora", "-o", tmp_path / "out", "--dry-run", "--json")
    assert planned.code == 0, planned
    assert json.loads(planned.out)["download_bytes"] == large // 2
    assert weights_sent(server) < large / 4


def test_a_base_that_only_says_names_is_not_downloaded(server, run, tmp_path, large):
    local = (
        tiny.save(tmp_path / "b", tiny.decoder(hidden=192)),
        tiny.save(tmp_path / "t", tiny.decoder(hidden=192, seed=2)),
    )
    assert run("extract", *local, "-o", tmp_path / "lora", "-q", "--rank", 2).code == 0
    for verb, *more in (("convert", "--to", "peft"), ("compress", "--rank", 1)):
        ended = run(verb, tmp_path / "lora", "-o", tmp_path / verb, "--base", "org/large", *more, "-q")
        assert ended.code == 0, ended
    assert weights_sent(server) < large / 2
    described = json.loads((tmp_path / "compress" / "lrmerge.json").read_text())["inputs"]["base"]
    assert described["revision"] == server.repositories["org/large"].commit("main")
    assert described["files"] == [{"file": "model.safetensors"}]


def test_a_mistake_is_told_before_the_download(server, run, tmp_path, large):
    server.repositories["org/other"] = Repository({"main": files(tiny.decoder(hidden=96))})
    ended = run("merge", slerp(tmp_path, "org/large", "org/other"), tmp_path / "out", "-q")
    assert ended.code == 1, ended
    assert weights_sent(server) < large / 2


@pytest.mark.parametrize(
    ("saved", "kind", "needed"), [(False, "adapter", False), (True, "adapter", True), (False, "model", True)]
)
def test_a_plan_says_whether_adapters_need_their_base(server, run, tmp_path, large, saved, kind, needed):
    factors = LowRank(torch.ones(2, 192), torch.ones(192, 2))
    weight = AdaptedWeight(Kind.LINEAR, factors, (192, 192))
    values = {tiny.NORM: torch.ones(192)} if saved else {}
    (tmp_path / "lora").mkdir()
    peft_write.save(Adapter({"model.layers.0.self_attn.q_proj.weight": weight}, saved=values), tmp_path / "lora")
    recipe = {"version": 1, "merge_method": "linear", "base_model": "org/large", "output": {"kind": kind}}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"adapters": [{"adapter": str(tmp_path / "lora")}]}))
    ended = run("plan", path, "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["download_bytes"] == (large // 2 if needed else 0)
    assert run("merge", path, tmp_path / "out", "-q").code == 0
    assert (weights_sent(server) > large // 2) == needed


@pytest.mark.parametrize("status", [429, 503])
def test_a_header_is_asked_for_again(server, run, tmp_path, large, status):
    commit = server.repositories["org/large"].commit("main")
    server.faults.append(Fault("GET", f"{commit}/model.safetensors", status=status, message="later"))
    ended = run("plan", slerp(tmp_path, "org/large", "org/large-tuned"), "--json")
    assert ended.code == 0, ended
    assert server.faults[0].times == 0


def words(folder: Path, names: list[str]) -> dict[str, bytes]:
    """The files of a tokenizer of whole words, in ``folder`` too."""
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=names[0]).save_pretrained(folder)
    return {file.name: file.read_bytes() for file in folder.glob("tokenizer*")}


def test_a_tokenizer_of_its_own_repository(server, run, tmp_path):
    server.repositories["org/words"] = Repository({"main": words(tmp_path / "words", ["b", "a", "new"])})
    tiny.save(tmp_path / "base", tiny.decoder())
    words(tmp_path / "base", ["a", "b", *map(str, range(tiny.VOCABULARY - 2))])
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / "base"), "parameters": {"weight": 1.0}}]}
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(recipe | {"dtype": "float32", "tokenizer_source": "org/words"}))
    ended = run("merge", path, tmp_path / "out", "-q")
    assert ended.code == 0, ended
    assert json.loads((tmp_path / "out" / "tokenizer.json").read_text())["model"]["vocab"]["b"] == 0
    table = load_file(tmp_path / "out" / "model.safetensors")[tiny.TABLE]
    assert torch.equal(table[:2], tiny.decoder()[tiny.TABLE][[1, 0]])

    path.write_text(yaml.safe_dump(recipe | {"dtype": "float32", "tokenizer_source": "org/no-words"}))
    said(run("merge", path, tmp_path / "none", "-q"), "org/no-words", "no such model")
    path.write_text(yaml.safe_dump(recipe | {"dtype": "float32", "tokenizer_source": "unoin"}))
    ended = run("merge", path, tmp_path / "none", "-q")
    assert ended.code == 2
    assert "'unoin' is no model of the recipe" in ended.err


def test_a_damaged_header_on_the_hub(server, run):
    whole = files(tiny.decoder())
    server.repositories["org/short"] = Repository(
        {"main": whole | {"model.safetensors": whole["model.safetensors"][:-8]}}
    )
    said(run("inspect", "org/short"), "model.safetensors", "is truncated")
    server.repositories["org/none"] = Repository({"main": whole | {"model.safetensors": b"<html>"}})
    said(run("inspect", "org/none"), "model.safetensors", "no whole safetensors file")


def test_an_outage_does_not_matter_to_what_is_in_the_cache(server, run, tmp_path):
    assert run("extract", "org/base", "org/finetuned@v1.0", "-o", tmp_path / "out", "-q").code == 0
    server.down = True
    assert run("inspect", "org/finetuned@v1.0").code == 0
    assert run("inspect", "org/finetuned@v1.0", endpoint=NOWHERE).code == 0
    said(run("inspect", "org/finetuned"), "org/finetuned", "cache", "reached")


def test_pickles_only_where_there_is_nothing_else(server, run):
    ended = run("inspect", "org/old", "--json")
    assert ended.code == 0, ended
    assert server.fetched() == {"config.json", "pytorch_model.bin"}
    assert run("inspect", "org/old", offline=True).code == 0


def test_a_branch_with_slashes(server, run):
    assert run("inspect", "org/finetuned@refs/pr/7").code == 0


@pytest.mark.parametrize(
    ("ref", "words"),
    [
        ("org/none", ("org/none", "no such model")),
        ("org/private", ("org/private", "no such model", "hf auth login")),
        ("org/gated", ("org/gated", "gated", "hf auth login")),
        ("org/finetuned@v9", ("org/finetuned@v9", "revision v9")),
        ("org/nothing", ("org/nothing", "no checkpoint file")),
        ("a--b/c", ("a--b/c", "no such model")),
    ],
)
def test_refusals(run, tmp_path, ref, words):
    said(run("extract", "org/base", ref, "-o", tmp_path / "out", "-q"), *words)
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_a_wrong_token_is_told(run):
    said(run("inspect", "org/gated", token="hf_wrong"), "org/gated", "gated")
    said(run("inspect", "org/private", token="hf_wrong"), "org/private", "no such model")


def test_unreachable(run):
    said(run("inspect", "org/base", endpoint=NOWHERE), "org/base", "cannot be reached")


def test_an_outage(server, run):
    server.down = True
    said(run("inspect", "org/base"), "org/base", "cannot be reached", "503")


def test_offline(server, run):
    said(run("inspect", "org/base", offline=True), "org/base", "OFFLINE")
    assert server.requests == []


def test_the_token_goes_to_the_hub_and_nowhere_else(server, run, tmp_path):
    out = tmp_path / "out"
    ended = run("extract", "org/base", "org/private", "-o", out, token=TOKEN)
    assert ended.code == 0, ended
    doctor = run("doctor", token=TOKEN)
    assert {token for _, path, token in server.requests if "private" in path} == {f"Bearer {TOKEN}"}
    assert {token for _, path, token in server.requests if "blob/" in path} == {None}
    for text in (ended.out, ended.err, doctor.out, doctor.err):
        assert TOKEN not in text
    for name, data in tiny.contents(out).items():
        assert TOKEN.encode() not in data, name
    for path in Path(tmp_path / "cache").rglob("*"):
        assert not path.is_file() or TOKEN.encode() not in path.read_bytes()
