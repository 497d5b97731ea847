"""The command line: what it prints, what it plans, what it writes; results on stdout, everything else on stderr."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import tiny
from tiny import DOWN, NORM, lrmerge


@pytest.fixture
def sides(tmp_path) -> list[Path]:
    base = tiny.decoder()
    tuned = tiny.finetuned(base)
    tuned[NORM] = tuned[NORM] + 1
    return [tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tuned)]


def test_help_and_version():
    shown = lrmerge("--help")
    assert shown.code == 0
    assert all(command in shown.out for command in ("extract", "inspect", "doctor"))
    assert lrmerge().out == shown.out
    assert lrmerge("--version").out.startswith("lrmerge ")
    assert "--rank" in lrmerge("extract", "-h").out


def test_help_does_not_import_torch():
    code = "import sys; sys.argv = ['lrmerge', 'extract', '-h']\nfrom lrmerge.app import main\ntry: main()\n"
    code += "finally: assert not {'torch', 'transformers', 'peft', 'huggingface_hub'} & sys.modules.keys()"
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_dry_run_writes_nothing_and_keeps_its_word(sides, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["extract", *sides, "-o", tmp_path / "out", "--rank", "4", "--exclude", "q_proj", "--json"]
    plan = json.loads(lrmerge(*arguments, "--dry-run").out)
    assert sorted(tmp_path.rglob("*")) == before

    ended = lrmerge(*arguments)
    report = json.loads(ended.out)
    assert ended.err == ""
    decomposed = {module["name"] for module in report["modules"]}
    others = {other["name"]: other for other in report["others"]}
    for parameter in plan["parameters"]:
        name, treatment = parameter["name"], parameter["treatment"]
        allowed = {"decompose": {"unchanged"}, "compare": {"unchanged", "saved"}, "leave": {"unchanged", "left out"}}
        if name in decomposed:
            assert treatment == "decompose"
        else:
            assert others[name]["state"] in allowed[treatment], name
        if treatment == "leave":
            assert parameter["reason"] == others[name]["reason"]
    assert {p["name"] for p in plan["parameters"]} == decomposed | others.keys()
    assert plan["read_bytes"] == report["read_bytes"]
    assert plan["options"] == json.loads((tmp_path / "out" / "lrmerge.json").read_text())["options"]


def test_json_agrees_with_the_manifest(sides, tmp_path):
    printed = json.loads(lrmerge("extract", *sides, "-o", tmp_path / "out", "--json", "--energy", "0.9").out)
    manifest = json.loads((tmp_path / "out" / "lrmerge.json").read_text())
    assert {key: manifest[key] for key in printed} == printed
    assert manifest["verb"] == "extract"
    assert manifest["options"]["energy"] == 0.9
    assert manifest["options"]["dtype"] == "float32"
    assert [file["file"] for file in manifest["inputs"]["base"]["files"]] == ["model.safetensors"]
    assert printed["adapter_bytes"] == (tmp_path / "out" / "adapter_model.safetensors").stat().st_size


def test_what_a_person_sees(sides, tmp_path):
    ended = lrmerge("extract", *sides, "-o", tmp_path / "out", "--rank", "4", "--exclude", "q_proj", "-v")
    assert ended.code == 0
    assert DOWN.removesuffix(".weight") in ended.out
    assert f"saved in full: 1 ({NORM}" in ended.out
    assert "left out: 2 (" in ended.out
    assert "--exclude q_proj" in ended.out
    assert str(tmp_path / "out") in ended.out
    assert "extract: 100%" in ended.err
    quiet = lrmerge("extract", *sides, "-o", tmp_path / "quiet", "-q")
    assert (quiet.code, quiet.out, quiet.err) == (0, "", "")
    plan = lrmerge("extract", *sides, "-o", tmp_path / "none", "--dry-run", "-v")
    assert f"decompose {DOWN} [24, 40]" in plan.out


def test_the_default_folder_is_named_after_the_fine_tune(sides, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert lrmerge("extract", *sides, "-q").code == 0
    assert (tmp_path / "tuned-lora" / "adapter_config.json").exists()


def test_names_of_other_tools_for_options(sides, tmp_path):
    options = ["--rel-error", "0.5", "--random-seed", "3", "--ram", "8GB", "-j", "1"]
    assert lrmerge("extract", *sides, "-o", tmp_path / "out", "-q", *options).code == 0
    chosen = json.loads((tmp_path / "out" / "lrmerge.json").read_text())["options"]
    assert (chosen["error"], chosen["seed"], chosen["memory"], chosen["threads"]) == (0.5, 3, "8GB", 1)


def test_nothing_changed(sides, tmp_path):
    ended = lrmerge("extract", sides[0], sides[0], "-o", tmp_path / "out")
    assert ended.code == 0, ended
    assert "total rank 0" in ended.out
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["peft_type"] == "LORA"


def test_doctor():
    found = json.loads(lrmerge("doctor", "--json").out)
    assert any(package.startswith("torch ") for package in found["packages"])
    assert found["devices"][0].startswith("cpu: ")
    shown = lrmerge("doctor")
    assert shown.code == 0
    assert all(topic in shown.out for topic in found)


def test_module_and_script_are_the_same(sides, tmp_path):
    """A real process: exit codes, one line on stderr, and a pipe that closes early is no traceback."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "lrmerge", "extract", str(sides[0]), str(tmp_path / "nothing"), "-o", "out"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert (ended.returncode, ended.stdout) == (1, "")
    assert ended.stderr.startswith("error: ")
    assert len(ended.stderr.splitlines()) == 1
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "lrmerge", "inspect", str(sides[0]), "--json"]
    closed = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True, env=environment)
    os.close(writer)
    assert "Traceback" not in closed.stderr
    assert closed.returncode != 0
