"""Push, with the real client of the Hub against a Hub of the tests: what goes up, and what comes back down."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import FrozenInstanceError
from pathlib import Path

import planted
import pytest
import tiny
import yaml
from hub_server import Fault, Hub, Repository
from pushing import BASE, REPO, copied, files, push, refused, results, with_base

import mergekit_lr as lr

LOADED = """
import sys, torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
{load}
here, there = load_file(sys.argv[1]), get_peft_model_state_dict(model)
assert here.keys() <= there.keys(), here.keys() - there.keys()
assert all(torch.equal(here[name], there[name]) for name in here)
print("LOADED", len(here))
"""


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def adapter(made, tmp_path, served) -> Path:
    with_base(served)
    return copied(made / "adapter", tmp_path / "adapter")


@pytest.fixture
def model(made, tmp_path, served) -> Path:
    with_base(served)
    return copied(made / "model", tmp_path / "model")


def downloaded(place: Path, repo: str = REPO, **options) -> Path:
    from huggingface_hub import snapshot_download

    return Path(snapshot_download(repo, local_dir=place, **options))


def test_a_new_repository(served: Hub, adapter):
    ended = push(adapter, "--private")
    assert ended.code == 0, ended
    assert served.repositories[REPO].access == "private"
    assert files(served).keys() == {path.name for path in adapter.iterdir()}
    weights = adapter / "adapter_model.safetensors"
    assert files(served)["adapter_model.safetensors"] == weights.read_bytes()
    assert weights.stat().st_size > served.chunk  # so it went up in parts
    assert served.uploaded() == weights.stat().st_size
    assert len(served.commits) == 1
    assert f"{served.endpoint}/{REPO}" in ended.out
    assert f'PeftModel.from_pretrained(model, "{REPO}")' in ended.out
    storage = [token for _, path, token in served.requests if path.startswith("lfs/") and not path.endswith("verify")]
    assert set(storage) == {None}, "the token went to the storage"


def test_what_went_up_comes_down_byte_for_byte(served: Hub, model, tmp_path):
    assert push(model).code == 0
    place = downloaded(tmp_path / "down")
    there = files(served)
    assert {name: data for name, data in tiny.contents(place).items() if not name.startswith(".")} == there
    shards = sorted(model.glob("*.safetensors"))
    assert len(shards) == 3
    assert all(there[shard.name] == shard.read_bytes() for shard in shards)
    assert lr.Checkpoint.open(place).tensors.keys() == lr.Checkpoint.open(model).tensors.keys()


def test_a_download_that_breaks_goes_on_with_the_rest(served: Hub, model, tmp_path):
    assert push(model).code == 0
    shard = max(model.glob("*.safetensors"), key=lambda path: path.stat().st_size)
    served.faults.append(Fault("GET", f"/{shard.name}", cut=5000))
    served.requests.clear()
    place = downloaded(tmp_path / "down", allow_patterns=[shard.name])
    assert (place / shard.name).read_bytes() == shard.read_bytes()
    assert len([path for _, path, _ in served.requests if path.endswith(shard.name)]) > 2


def test_the_printed_code_loads_it_with_peft(served: Hub, adapter, made, tmp_path):
    base = {path.name: path.read_bytes() for path in (made / "base").iterdir()}
    served.repositories[BASE] = Repository({"main": base})
    report = lr.push(adapter, REPO, base_model=BASE)
    settings = {"HF_ENDPOINT": served.endpoint, "HF_HOME": str(tmp_path / "home"), "HF_HUB_DISABLE_XET": "1"}
    program = [sys.executable, "-c", LOADED.format(load=report.load), str(adapter / "adapter_model.safetensors")]
    ended = subprocess.run(program, capture_output=True, text=True, env=os.environ | settings, cwd=tmp_path)
    assert "LOADED" in ended.stdout, ended.stderr[-2000:]


def test_a_second_push_sends_what_changed_and_keeps_the_users_card(served: Hub, adapter):
    assert push(adapter).code == 0
    there = served.repositories[REPO].files["main"]
    card = there["README.md"].decode()
    mine = "## What I use it for\n\nFor tests."
    there["README.md"] = card.replace("- phlora\n", "- phlora\n- mine\n", 1).encode() + f"\n{mine}\n".encode()
    there["evaluation.txt"] = b"mine as well"
    served.received.clear()

    manifest = json.loads((adapter / "lrmerge.json").read_text())
    (adapter / "lrmerge.json").write_text(json.dumps(manifest | {"seconds": 1.5}, indent=1))
    ended = push(adapter, "--json")
    report = json.loads(ended.out)
    states = {file["name"]: file["state"] for file in report["files"]}
    assert {name for name, state in states.items() if state != "same"} == {"lrmerge.json"}
    assert served.uploaded() == 0
    assert served.commits[-1]["paths"] == ["lrmerge.json"]
    after = files(served)
    assert mine in after["README.md"].decode()
    assert "- mine\n" in after["README.md"].decode()
    assert after["evaluation.txt"] == b"mine as well"

    again = push(adapter, "--json")
    assert json.loads(again.out)["commit"] is None
    assert len(served.commits) == 2


def test_the_users_card_survives_a_new_result(served: Hub, adapter, made, tmp_path):
    assert push(adapter).code == 0
    there = served.repositories[REPO].files["main"]
    there["README.md"] += b"\nWritten on the Hub.\n"
    again = tiny.lrmerge("extract", made / "base", made / "tuned", "-o", tmp_path / "new", "--rank", 1, "-q")
    assert again.code == 0
    with (tmp_path / "new" / "README.md").open("a") as card:
        card.write("\nWritten here.\n")
    ended = push(tmp_path / "new", "--json")
    assert "both are in it now" in " ".join(json.loads(ended.out)["notes"])
    card = files(served)["README.md"].decode()
    assert "Written on the Hub." in card
    assert "Written here." in card
    assert "--rank 1" in card
    assert "--rank 2" not in card


def test_a_push_goes_on_after_a_broken_connection(served: Hub, model):
    served.chunk = 1 << 20  # every shard in one piece
    shards = sorted(model.glob("*.safetensors"))
    names = {served_name(shard): shard for shard in shards}
    last = list(names)[-1]
    served.faults.append(Fault("PUT", last, cut=2000, times=100))
    refused(push(model), REPO, shards[-1].name, "connection", "same command goes on")
    assert files(served) == {}, "half a result is shown"
    assert served.objects.keys() == names.keys() - {last}

    served.faults.clear()
    served.received.clear()
    assert push(model).code == 0
    assert served.uploaded() == shards[-1].stat().st_size
    assert all(files(served)[shard.name] == shard.read_bytes() for shard in shards)


def served_name(path: Path) -> str:
    from hub_state import digest

    return digest(path.read_bytes())


def test_a_connection_that_breaks_once_is_tried_again(served: Hub, adapter, waits):
    served.faults.append(Fault("PUT", "lfs/", cut=100))
    assert push(adapter).code == 0
    assert waits == [1]
    assert files(served)["adapter_model.safetensors"] == (adapter / "adapter_model.safetensors").read_bytes()


def test_a_slow_connection_is_waited_for(served: Hub, adapter):
    served.faults.append(Fault("PUT", "lfs/", slow=0.02))
    assert push(adapter).code == 0


def test_weights_go_by_xet_where_it_is_installed(served: Hub, model, tmp_path, monkeypatch):
    """The way that a client with hf_xet takes by itself: to a storage of its own, here a folder."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    refused(push(model), REPO, "sending model-00001-of-00003.safetensors", "needs write access")
    assert served.commits == []

    served.xet = tmp_path / "storage"
    ended = push(model)
    assert ended.code == 0, ended
    shards = sorted(model.glob("*.safetensors"))
    assert all(files(served)[shard.name].decode().endswith(served_name(shard)) for shard in shards)
    stored = sum(path.stat().st_size for path in served.xet.rglob("*") if path.is_file())
    assert stored > sum(shard.stat().st_size for shard in shards) / 2
    assert served.uploaded() == 0


def test_a_dry_run_changes_nothing(served: Hub, adapter):
    served.repositories[REPO] = Repository({"main": {"lrmerge.json": b"{}", "old.safetensors": b"x", "mine.png": b"y"}})
    before = dict(served.repositories[REPO].files["main"])
    ended = push(adapter, "--dry-run", "--json")
    states = {file["name"]: file["state"] for file in json.loads(ended.out)["files"]}
    assert states == {
        "README.md": "new",
        "adapter_config.json": "new",
        "adapter_model.safetensors": "new",
        "lrmerge.json": "changed",
        "old.safetensors": "removed",
        "spectrum.svg": "new",
    }
    assert served.repositories[REPO].files == {"main": before}
    assert {method for method, path, _ in served.requests if "validate-yaml" not in path} <= {"GET", "HEAD"}
    shown = push(adapter, "--dry-run")
    assert "removed" in shown.out
    assert "nothing is sent" in shown.out

    assert push(adapter).code == 0
    assert "old.safetensors" not in files(served)
    assert files(served)["mine.png"] == b"y"


def test_a_repository_of_someone_elses_work_is_not_overwritten(served: Hub, adapter):
    theirs = {"adapter_model.safetensors": b"theirs", "README.md": b"# theirs\n", "pytorch_model.bin": b"theirs"}
    served.repositories[REPO] = Repository({"main": dict(theirs)})
    line = refused(push(adapter), REPO, "adapter_model.safetensors", "--overwrite", "--create-pr", code=2)
    assert "README.md" not in line
    assert files(served) == theirs

    assert push(adapter, "--create-pr").code == 0
    assert files(served) == theirs
    assert "# theirs" in files(served, revision="refs/pr/1")["README.md"].decode()

    assert push(adapter, "--overwrite").code == 0
    assert "pytorch_model.bin" not in files(served)
    assert files(served)["adapter_model.safetensors"] != b"theirs"


def test_a_pull_request(served: Hub, adapter):
    assert push(adapter).code == 0
    before = files(served)
    (adapter / "LICENSE").write_text("mine")
    ended = push(adapter, "--create-pr", "--commit-message", "Offer a licence")
    assert ended.code == 0, ended
    assert f"{REPO}/discussions/1" in ended.out
    assert files(served) == before
    assert files(served, revision="refs/pr/1")["LICENSE"] == b"mine"
    assert served.commits[-1]["summary"] == "Offer a licence"


def test_a_branch(served: Hub, adapter):
    assert push(adapter, "--revision", "rank/2").code == 0
    assert files(served) == {}
    assert "adapter_model.safetensors" in files(served, revision="rank/2")
    assert json.loads(push(adapter, "--revision", "rank/2", "--json").out)["commit"] is None


@pytest.mark.parametrize("collection", ["me/low-rank-0123456789abcdef01234567", "Low rank"])
def test_a_collection(served: Hub, adapter, collection):
    if "/" in collection:
        served.collections[collection] = []
    assert push(adapter, "--collection", collection).code == 0
    assert list(served.collections.values()) == [[REPO]]
    assert push(adapter, "--collection", collection).code == 0
    assert list(served.collections.values()) == [[REPO]]


def test_a_name_without_an_owner_is_of_the_account(served: Hub, adapter):
    assert push(adapter, repo="result").code == 0
    assert "adapter_model.safetensors" in files(served, "me/result")


def test_a_public_repository_is_not_taken_for_a_private_one(served: Hub, adapter):
    served.repositories[REPO] = Repository({"main": {}})
    refused(push(adapter, "--private"), REPO, "public already", code=2)
    served.repositories[REPO] = Repository({"main": {}}, access="private")
    ended = push(adapter, "--public")
    assert ended.code == 0
    assert "stays private" in ended.err


def test_the_python_call(served: Hub, adapter):
    steps = []
    report = lr.push(adapter, REPO, base_model=BASE, progress=steps.append)
    assert isinstance(report, lr.PushReport)
    assert report.created
    assert report.kind == "adapter"
    assert report.states == {"new": len(report.files)}
    assert [step.done for step in steps] == sorted(step.done for step in steps)
    assert steps[-1].done == steps[-1].total == report.nbytes
    with pytest.raises(FrozenInstanceError):
        report.url = ""  # type: ignore[misc]


def test_only_the_result_goes_up(served: Hub, adapter):
    (adapter / ".env").write_text("X=1")
    (adapter / "journal.jsonl").write_text("{}")
    (adapter / "results.bin").write_bytes(b"0")
    (adapter / "adapter_model.safetensors.partial").write_bytes(b"0")
    (adapter / "notes").mkdir()
    (adapter / "notes" / "mine.md").write_text("mine")
    ended = push(adapter, "--json")
    left = json.loads(ended.out)["left"]
    others = {".env", "journal.jsonl", "results.bin", "adapter_model.safetensors.partial", "notes"}
    assert left.keys() == others
    assert not files(served).keys() & others


@pytest.mark.parametrize("verb", ["extract", "compress", "merge"])
def test_other_verbs_push_their_result(served: Hub, made, tmp_path, verb, monkeypatch):
    base, out = tmp_path / "base", tmp_path / "out"
    served.repositories[BASE] = Repository({"main": {p.name: p.read_bytes() for p in (made / "base").iterdir()}})
    tiny.save(tmp_path / "tuned", tiny.finetuned(tiny.decoder(), rank=2))
    recipe = {"merge_method": "linear", "base_model": BASE, "models": [{"model": BASE}, {"model": str(base)}]}
    if verb == "merge":
        tiny.save(base, tiny.decoder(seed=3))
        (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    config = json.loads((made / "adapter" / "adapter_config.json").read_text()) | {"base_model_name_or_path": BASE}
    copied(made / "adapter", tmp_path / "adapter").joinpath("adapter_config.json").write_text(json.dumps(config))
    command = {
        "extract": ("extract", BASE, tmp_path / "tuned", "-o", out, "--rank", 2),
        "compress": ("compress", tmp_path / "adapter", "-o", out, "--rank", 1),
        "merge": ("merge", tmp_path / "recipe.yaml", out),
    }[verb]
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    served.revoked.add("hf_revoked")
    refused(tiny.lrmerge(*command, "--push", REPO), "does not take the token")
    assert not out.exists(), "it worked before it asked"
    monkeypatch.setenv("HF_TOKEN", planted.marker())
    ended = tiny.lrmerge(*command, "--push", REPO, "--private", "--json")
    assert ended.code == 0, ended
    assert json.loads(ended.out)["push"]["repo"] == REPO
    assert files(served).keys() == {path.name for path in out.iterdir()}
    assert served.repositories[REPO].access == "private"
    assert BASE in files(served)["README.md"].decode()


def test_a_result_that_cannot_be_pushed_stays(served: Hub, made, tmp_path):
    command = ("extract", made / "base", made / "tuned", "-o", tmp_path / "out", "--rank", 1, "-q", "--push", REPO)
    refused(tiny.lrmerge(*command), "is written, and not pushed", "--base-model")
    assert push(tmp_path / "out").code == 0


def test_a_recipe_pushes(served: Hub, made, tmp_path):
    with_base(served)
    recipe = {"version": 1, "merge_method": "linear", "adapters": [{"adapter": str(made / "adapter")}]}
    recipe["push"] = {"repo": REPO, "private": True, "base_model": [BASE]}
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    ended = tiny.lrmerge("merge", tmp_path / "recipe.yaml", tmp_path / "out")
    assert ended.code == 0, ended
    assert f"pushed to {served.endpoint}/{REPO}" in ended.err
    assert served.repositories[REPO].access == "private"
    assert "adapter_model.safetensors" in files(served)
    with pytest.raises(lr.LrmergeError, match="memory"):
        lr.merge(recipe)
