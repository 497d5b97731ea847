"""What is checked before anything is sent: the result loads, names its base, and holds nothing that must stay here."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import planted
import pytest
import tiny
import torch
from hub_server import Hub, Repository
from pushing import BASE, REPO, copied, files, push, refused, results, with_base
from safetensors.torch import load_file, save_file

import mergekit_lr as lr
from mergekit_lr.verbs.push.leaks import leaks
from mergekit_lr.verbs.push.names import names_of

KEY = "-----BEGIN " + "OPENSSH PRIVATE KEY-----"


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


def edit(file: str, change: Callable[[str], str]) -> Callable[[Path], None]:
    def apply(folder: Path) -> None:
        (folder / file).write_text(change((folder / file).read_text()))

    return apply


def truncated(folder: Path) -> None:
    path = min(folder.glob("*.safetensors"))
    path.write_bytes(path.read_bytes()[:-4])


def without_a_shard(folder: Path) -> None:
    max(folder.glob("*-of-*.safetensors")).unlink()


def strange_key(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({**tensors, "what.is.this": next(iter(tensors.values())).clone()}, path)


def metadata(line: str) -> Callable[[str], str]:
    return lambda card: card.replace("---\n", f"---\n{line}\n", 1)


WRONG = {
    "truncated": (truncated, ("adapter_model.safetensors", "truncated")),
    "key": (strange_key, ("what.is.this",)),
    "config": (edit("adapter_config.json", lambda text: text[:40]), ("adapter_config.json", "JSON")),
    "weights": (lambda folder: (folder / "adapter_model.safetensors").unlink(), ("safetensors",)),
    "card": (lambda folder: (folder / "README.md").unlink(), ("README.md", "missing")),
    "yaml": (edit("README.md", metadata("tags: [a")), ("README.md", "metadata")),
    "relation": (edit("README.md", metadata("base_model_relation: cousin")), ("base_model_relation", "cousin")),
    "no metadata": (edit("README.md", lambda card: card.split("---\n", 2)[2]), ("README.md", "metadata")),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_an_adapter_that_is_wrong_is_not_sent(served: Hub, adapter, name):
    change, words = WRONG[name]
    change(adapter)
    refused(push(adapter), *words)
    assert REPO not in served.repositories


@pytest.mark.parametrize(("change", "words"), [(truncated, ("truncated",)), (without_a_shard, ("00003-of-00003",))])
def test_a_model_that_is_wrong_is_not_sent(served: Hub, model, change, words):
    change(model)
    refused(push(model), *words)
    assert REPO not in served.repositories


def test_no_folder(served: Hub, adapter, tmp_path):
    (tmp_path / "empty").mkdir()
    refused(push(tmp_path / "none"), "no such folder", code=2)
    refused(push(adapter / "adapter_model.safetensors"), "one file", code=2)
    refused(push(tmp_path / "empty"), "no .safetensors")


@pytest.mark.parametrize(
    ("file", "line", "words"),
    [
        ("README.md", "token: hf_" + "a" * 34, ("README.md line", "Hugging Face token", "revoke")),
        ("lrmerge.json", "AKIA" + "ABCDEFGH12345678", ("lrmerge.json line", "AWS")),
        ("notes.txt", KEY, ("notes.txt line 3", "private key")),
        ("tokenizer.json", "ghp_" + "b" * 36, ("tokenizer.json line", "GitHub")),
        ("config.yaml", "key: sk-proj-" + "c" * 40, ("config.yaml line 3", "OpenAI")),
        ("README.md", "see /home/me/models/x", ("README.md line", "/home/me", "absolute path")),
        ("notes.md", r"C:\\Users\\me\\models", ("notes.md line 3", "absolute path")),
        ("report.html", "<a href='file:///srv/x'>", ("report.html line 3", "absolute path")),
        ("extra.json", '"cache": "/gpfs7/projects/x"', ("extra.json line 3", "/gpfs7/projects/x")),
    ],
)
def test_secrets_and_paths_stop_a_push(served: Hub, adapter, file, line, words):
    path = adapter / file
    # A key of JSON that lrmerge's own file may have: valid, and not rewritten.
    if file == "lrmerge.json":
        path.write_text(json.dumps(json.loads(path.read_text()) | {"notes": [line]}, indent=1))
    else:
        path.write_text((path.read_text() if path.exists() else "first\nsecond\n") + f"{line}\n")
    said = refused(push(adapter), *words)
    assert "hf_aaaa" not in said
    assert REPO not in served.repositories


def test_the_token_in_use_stops_a_push_in_whatever_form(served: Hub, adapter, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "an odd token")
    (adapter / "notes.txt").write_text("first\nwith an odd token in it\n")
    said = refused(push(adapter), "notes.txt line 2", "logged in")
    assert "odd" not in said


def test_a_secret_in_the_metadata_of_weights_stops_a_push(served: Hub, adapter):
    path = adapter / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file(tensors, path, metadata={"format": "pt", "ss_note": "hf_" + "d" * 34})
    refused(push(adapter), "adapter_model.safetensors", "ss_note", "Hugging Face token")
    save_file(tensors, path, metadata={"format": "pt", "ss_dataset": "/home/me/pictures"})
    ended = push(adapter)
    assert ended.code == 0
    assert "ss_dataset holds the absolute path" in ended.err


@pytest.mark.parametrize(
    "text",
    [
        "https://huggingface.co/home/me/x",
        "see /path/to/adapter",
        "and/or, 1/home/2",
        "`</tool_call>` and /no_think",
        "#!/usr/bin/env python",
        "path/to/base",
        "alpha / r, B @ A",
        "hf_hub_download(repo)",
        '"lora": "model.layers.0/home/x"',
    ],
)
def test_what_is_no_leak(text):
    assert list(leaks(text)) == []


def test_a_vocabulary_may_hold_words_that_look_like_paths(served: Hub, adapter):
    (adapter / "vocab.json").write_text('{"/home/user": 1, "/tmp/x": 2}')
    assert push(adapter).code == 0
    assert files(served)["vocab.json"] == b'{"/home/user": 1, "/tmp/x": 2}'


@pytest.mark.parametrize("kind", ["adapter", "model"])
def test_paths_of_inputs_get_other_names(served: Hub, made, request, kind):
    folder = request.getfixturevalue(kind)
    before = tiny.contents(folder)
    assert str(made).encode() in before["lrmerge.json"]
    ended = push(folder)
    assert ended.code == 0, ended
    assert f"{made / 'base'} is {BASE}" in ended.err
    there = files(served)
    assert tiny.contents(folder) == before, "the result itself was changed"
    assert [name for name, data in there.items() if str(made).encode() in data] == []
    manifest = json.loads(there["lrmerge.json"])
    assert manifest["base"] == BASE
    assert manifest["inputs"]["base"]["ref"] == BASE
    assert manifest["out"] == kind
    card = there["README.md"].decode()
    assert f"base_model: {BASE}\n" in card
    if kind == "adapter":
        assert manifest["finetuned"] == "tuned"
        assert json.loads(there["adapter_config.json"])["base_model_name_or_path"] == BASE
        assert f'from_pretrained("{BASE}")' in card


def test_a_base_that_is_a_folder_needs_a_name(served: Hub, adapter, made):
    refused(push(adapter, base=None), str(made / "base"), "no model of the Hub", "--base-model org/name")
    refused(push(adapter, base="three/parts/here"), "--base-model", "org/name", code=2)
    refused(push(adapter, base="other=org/base"), "names no base other", code=2)
    assert push(adapter, base=f"base={BASE}").code == 0
    assert json.loads(files(served)["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_several_bases_are_named_one_by_one(served: Hub, made, tmp_path):
    with_base(served)
    served.repositories["org/tuned"] = served.repositories[BASE]
    models = [{"model": str(made / name), "parameters": {"weight": 0.5}} for name in ("base", "tuned")]
    lr.merge({"merge_method": "linear", "models": models}, tmp_path / "merged")
    refused(push(tmp_path / "merged"), "of which base", "base", "tuned", code=2)
    ended = tiny.lrmerge(
        "push", tmp_path / "merged", REPO, "--base-model", "base=org/base", "--base-model", "tuned=org/tuned"
    )
    assert ended.code == 0, ended
    card = files(served)["README.md"].decode()
    assert "base_model:\n- org/base\n- org/tuned\nbase_model_relation: merge" in card
    assert str(made) not in card


def test_a_base_in_the_cache_of_the_hub_has_its_id(tmp_path):
    place = tmp_path / "models--org--base" / "snapshots" / ("0" * 40)
    tiny.save(place, tiny.decoder())
    manifest = {"inputs": {"base": {"ref": str(place)}}, "base": str(place), "out": "/home/me/out"}
    names = names_of(manifest, [str(place)], Path("/home/me/out"), [])
    assert names.ids == {str(place): "org/base"}
    assert names.clean(f'"base": "{place}", "out": "/home/me/out"') == '"base": "org/base", "out": "out"'


def test_names_take_the_place_of_whole_paths_only():
    manifest = {"inputs": {"base": {"ref": "/a/b/base"}, "finetuned": {"ref": "/a/c/base"}, "old": {"ref": "base"}}}
    names = names_of(manifest, ["base"], Path("/x/out"), ["org/base"])
    text = '{"base": "base", "x": "/a/b/base", "y": "/a/c/base:0.5", "z": "/a/b/base-2", "base_model": "the base"}'
    cleaned = '{"base": "org/base", "x": "base", "y": "c-base:0.5", "z": "/a/b/base-2", "base_model": "the base"}'
    assert names.clean(text) == cleaned


@pytest.mark.parametrize("access", ["gated", "private"])
def test_the_card_says_that_the_base_is_not_for_everyone(served: Hub, adapter, access):
    with_base(served, access=access)
    ended = push(adapter)
    assert ended.code == 0
    assert access in ended.err
    card = files(served)["README.md"].decode()
    assert f"> The base `{BASE}` is {access}" in card
    assert card.index("> The base") < card.index("## Load it")
    assert ("makes its name public" in ended.err) == (access == "private")
    assert json.loads(push(adapter, "--json").out)["commit"] is None


def test_weights_made_from_a_private_base(served: Hub, model):
    with_base(served, access="private")
    assert "its terms hold" in push(model).err
    assert "its terms hold" not in push(model, "--private", repo="me/other").err


def test_an_unknown_base_is_told(served: Hub, adapter):
    ended = push(adapter, base="org/nothing")
    assert ended.code == 0
    assert "org/nothing: the Hub has no such base" in ended.err


def test_a_missing_licence_is_told(served: Hub, adapter):
    assert "names no licence" in push(adapter).err
    edit("README.md", metadata("license: mit"))(adapter)
    assert "names no licence" not in push(adapter).err
    assert b"license: mit" in files(served)["README.md"]


def test_a_folder_of_another_tool(served: Hub, tmp_path):
    ended = push(tiny.save(tmp_path / "model", tiny.decoder()), base=None)
    assert ended.code == 0, ended
    assert "no README.md" in ended.err
    assert files(served).keys() == {"config.json", "model.safetensors"}
    assert f'LlamaForCausalLM.from_pretrained("{REPO}")' in ended.out


def test_an_adapter_that_names_no_base_gets_one(served: Hub, adapter):
    config = json.loads((adapter / "adapter_config.json").read_text()) | {"base_model_name_or_path": None}
    (adapter / "adapter_config.json").write_text(json.dumps(config, indent=2))
    (adapter / "lrmerge.json").unlink()
    assert push(adapter, base=None).code == 0
    assert push(adapter, "--overwrite").code == 0
    assert json.loads(files(served)["adapter_config.json"])["base_model_name_or_path"] == BASE


def test_a_file_of_another_dialect_in_a_folder(served: Hub, tmp_path):
    file = tmp_path / "kohya" / "lora.safetensors"
    file.parent.mkdir()
    with_base(served)
    module = "lora_unet_mid_block_attentions_0_proj_in"
    factors = {f"{module}.lora_{side}.weight": torch.ones(4, 4) for side in ("down", "up")}
    save_file({**factors, f"{module}.alpha": torch.tensor(4.0)}, file)
    manifest = {"verb": "convert", "inputs": {"adapter": {"ref": str(tmp_path / "in")}}, "out": str(file)}
    (file.parent / "lora.lrmerge.json").write_text(json.dumps(manifest))
    ended = push(file.parent)
    assert ended.code == 0, ended
    assert files(served).keys() == {"lora.safetensors", "lora.lrmerge.json"}
    assert str(tmp_path).encode() not in files(served)["lora.lrmerge.json"]


def test_planted_token_is_the_one_in_use(served: Hub, adapter):
    assert push(adapter).code == 0
    tokens = {token for _, path, token in served.requests if path.startswith("api/models")}
    assert tokens == {f"Bearer {planted.marker()}"}
    assert isinstance(served.repositories[REPO], Repository)
