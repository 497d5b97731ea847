"""Sharded output: the base's files or files cut anew, laid out before their tensors, found again after a kill."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.shards import MemoryOutput, ShardedOutput, as_in, cut_at, has_index

TENSORS = {
    "a": torch.arange(12.0).reshape(3, 4),
    "b": torch.arange(8).to(torch.bfloat16).reshape(2, 4),
    "c": torch.arange(5),
    "empty": torch.empty(0, 3),
    "scalar": torch.tensor(7.0),
}
HEADERS = {name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in TENSORS.items()}


def fill(output) -> None:
    """Every tensor in two parts, the second first."""
    for name, tensor in TENSORS.items():
        flat = tensor.reshape(-1)
        for start, stop in ((len(flat) // 2, len(flat)), (0, len(flat) // 2)):
            output.write(name, start, flat[start:stop])


def same(found: dict[str, torch.Tensor]) -> bool:
    return found.keys() == TENSORS.keys() and all(torch.equal(found[name], TENSORS[name]) for name in TENSORS)


def test_parts_in_any_order_make_the_tensors(tmp_path):
    output = ShardedOutput(tmp_path, {"model.safetensors": HEADERS}, metadata={"made": "here"})
    fill(output)
    output.finish(index=False)
    assert same(load_file(tmp_path / "model.safetensors"))
    assert Checkpoint.open(tmp_path).metadata == {"format": "pt", "made": "here"}
    assert not (tmp_path / "model.safetensors.index.json").exists()


def test_in_memory(tmp_path):
    output = MemoryOutput(HEADERS, {"c": TENSORS["c"]})
    for name in HEADERS.keys() - {"c"}:
        output.write(name, 0, TENSORS[name])
    assert same(output.tensors)
    assert output.tensors["c"] is TENSORS["c"]


def test_a_cut_keeps_order_and_size_and_writes_the_index(tmp_path):
    files = cut_at({"model.safetensors": HEADERS}, 59)
    assert list(files) == [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]
    assert [list(held) for held in files.values()] == [["a"], ["b", "c", "empty"], ["scalar"]]
    output = ShardedOutput(tmp_path, files, metadata={})
    fill(output)
    output.finish(index=False)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert index["metadata"] == {"total_size": sum(tensor.nbytes for tensor in TENSORS.values())}
    assert index["weight_map"]["scalar"] == "model-00003-of-00003.safetensors"
    opened = Checkpoint.open(tmp_path)
    assert has_index(opened)
    assert same({name: opened.read(name) for name in opened.tensors})


def test_one_shard_has_the_plain_name():
    cut = cut_at({"diffusion_pytorch_model-00001-of-00002.safetensors": {"a": HEADERS["a"]}, "x": {}}, 10**9)
    assert list(cut) == ["diffusion_pytorch_model.safetensors"]


def test_files_follow_the_base(tmp_path):
    save_file({"z": TENSORS["a"], "b": TENSORS["a"] + 1}, tmp_path / "model-00001-of-00002.safetensors")
    save_file({"a": TENSORS["a"]}, tmp_path / "model-00002-of-00002.safetensors")
    base = Checkpoint.open(tmp_path)
    headers = dict.fromkeys(("a", "b", "new", "other", "z"), HEADERS["a"])
    files = as_in(base, headers, {"new": "z"})
    assert list(files["model-00001-of-00002.safetensors"]) == ["b", "z", "new"]
    assert list(files["model-00002-of-00002.safetensors"]) == ["a", "other"]


def test_pickled_and_unnamed_files_become_safetensors(tmp_path):
    torch.save({"a": TENSORS["a"]}, tmp_path / "pytorch_model.bin")
    assert list(as_in(Checkpoint.open(tmp_path), {"a": HEADERS["a"]}, {})) == ["model.safetensors"]
    assert list(as_in(Checkpoint.from_tensors(TENSORS), HEADERS, {})) == ["model.safetensors"]


def test_resuming_keeps_what_is_laid_out_and_remakes_what_is_not(tmp_path):
    files = {"one.safetensors": {"a": HEADERS["a"]}, "two.safetensors": {"b": HEADERS["b"]}}
    output = ShardedOutput(tmp_path, files, metadata={})
    output.write("a", 0, TENSORS["a"])
    output.write("b", 0, TENSORS["b"])
    two = (tmp_path / "two.safetensors").read_bytes()
    (tmp_path / "two.safetensors").write_bytes(two[:-1])  # killed while it was laid out
    again = ShardedOutput(tmp_path, files, metadata={}, resume=True)
    assert torch.equal(load_file(tmp_path / "one.safetensors")["a"], TENSORS["a"])
    assert not load_file(tmp_path / "two.safetensors")["b"].any()
    again.write("b", 0, TENSORS["b"])
    assert (tmp_path / "two.safetensors").read_bytes() == two


@pytest.mark.parametrize(("start", "part"), [(11, torch.zeros(2)), (0, torch.zeros(2, dtype=torch.float64))])
def test_what_does_not_fit_is_refused(tmp_path, start, part):
    output = ShardedOutput(tmp_path, {"one.safetensors": {"a": HEADERS["a"]}}, metadata={})
    with pytest.raises(ValueError, match="do not fit"):
        output.write("a", start, part)
