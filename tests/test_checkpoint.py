"""Checkpoints: what is read is what was written, whatever the files; fp8 with scales is what its makers say it is."""

from __future__ import annotations

import json
import struct

import pytest
import tiny
import torch
from safetensors.torch import load_file, save_file
from tiny import DOWN

import mergekit_lr as lr
from mergekit_lr.checkpoint.checkpoint import Checkpoint, storage_dtype
from mergekit_lr.checkpoint.names import aligned, unwrapped
from mergekit_lr.checkpoint.safetensors import DTYPES, read_header, read_tensor
from mergekit_lr.checkpoint.writer import SafetensorsWriter, write_tensors
from mergekit_lr.errors import MismatchError


def same(checkpoint: Checkpoint, tensors: tiny.Tensors) -> bool:
    return checkpoint.tensors.keys() == tensors.keys() and all(
        torch.equal(checkpoint.read(name), tensor) and checkpoint.read(name).dtype is tensor.dtype
        for name, tensor in tensors.items()
    )


# Opening


def test_parts_are_those_of_the_whole(tmp_path):
    tensors = tiny.decoder(dtype=torch.bfloat16)
    for checkpoint in (Checkpoint.open(tiny.save(tmp_path / "model", tensors)), Checkpoint.from_tensors(tensors)):
        for name, tensor in tensors.items():
            part = checkpoint.parts(name)
            for start, stop in ((0, 1), (1, tensor.numel() // 2), (tensor.numel() - 1, tensor.numel())):
                assert torch.equal(part(start, stop), tensor.reshape(-1)[start:stop])


def test_every_way_to_open(tmp_path):
    tensors = tiny.decoder()
    single, sharded = tiny.save(tmp_path / "one", tensors), tiny.save(tmp_path / "many", tensors, shards=3)
    torch.save({"state_dict": tensors}, tmp_path / "model.bin")
    assert same(Checkpoint.open(single), tensors)
    assert same(Checkpoint.open(str(single / "model.safetensors")), tensors)
    assert same(Checkpoint.open(sharded), tensors)
    assert same(Checkpoint.open(sharded / "model-00002-of-00003.safetensors"), tensors)
    (sharded / "model.safetensors.index.json").unlink()
    assert same(Checkpoint.open(sharded), tensors)
    assert same(Checkpoint.open(tmp_path / "model.bin"), tensors)
    assert same(Checkpoint.open(tensors), tensors)
    opened = Checkpoint.open(single)
    assert Checkpoint.open(opened) is opened
    assert opened.config == tiny.CONFIG
    assert opened.nbytes == sum(tensor.nbytes for tensor in tensors.values())
    assert opened.files == [single / "model.safetensors"]


def test_safetensors_go_before_pickles(tmp_path):
    folder = tiny.save(tmp_path / "both", tiny.decoder())
    (folder / "pytorch_model.bin").write_bytes(b"not to be opened")
    assert same(Checkpoint.open(folder), tiny.decoder())


def test_old_pickles(tmp_path):
    torch.save(tiny.decoder(), tmp_path / "old.bin", _use_new_zipfile_serialization=False)
    assert same(Checkpoint.open(tmp_path / "old.bin"), tiny.decoder())


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype(tmp_path, name):
    data = torch.arange(64, dtype=torch.uint8).clone()
    tensor = (data % 2).bool() if name == "BOOL" else data.view(DTYPES[name])
    save_file({"w": tensor}, tmp_path / "w.safetensors")
    read = Checkpoint.open(tmp_path / "w.safetensors").read("w")
    assert read.dtype is DTYPES[name]
    assert torch.equal(read.view(torch.uint8), tensor.view(torch.uint8))


def test_unaligned_empty_and_scalar_tensors(tmp_path):
    """Legal in the format: data that starts at an odd byte, no data, no axes."""
    header = {
        "__metadata__": {"who": "me"},
        "odd": {"dtype": "U8", "shape": [1], "data_offsets": [0, 1]},
        "w": {"dtype": "F32", "shape": [2], "data_offsets": [1, 9]},
        "none": {"dtype": "F16", "shape": [0, 3], "data_offsets": [9, 9]},
        "scalar": {"dtype": "I64", "shape": [], "data_offsets": [9, 17]},
    }
    text = json.dumps(header).encode()
    data = bytes([7]) + struct.pack("<2fq", 1.5, -2.0, 42)
    (tmp_path / "w.safetensors").write_bytes(len(text).to_bytes(8, "little") + text + data)
    checkpoint = Checkpoint.open(tmp_path / "w.safetensors")
    assert checkpoint.read("odd").tolist() == [7]
    assert checkpoint.read("w").tolist() == [1.5, -2.0]
    assert checkpoint.parts("w")(1, 2).tolist() == [-2.0]
    assert checkpoint.parts("none")(0, 0).tolist() == []
    assert checkpoint.read("none").shape == (0, 3)
    assert checkpoint.read("scalar").item() == 42
    assert checkpoint.metadata == {"who": "me"}


def test_one_entry_of_a_stack(tmp_path):
    stack = torch.arange(24.0).view(4, 2, 3)
    save_file({"w": stack}, tmp_path / "w.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "w.safetensors")
    assert all(torch.equal(checkpoint.read("w", i), stack[i]) for i in range(4))


def test_a_tensor_is_a_view_that_outlives_its_file(tmp_path):
    save_file({"w": torch.ones(5000)}, tmp_path / "w.safetensors")
    before = (tmp_path / "w.safetensors").read_bytes()
    tensor = Checkpoint.open(tmp_path / "w.safetensors").read("w")
    tensor.add_(1)  # copy-on-write: never into the file
    assert (tmp_path / "w.safetensors").read_bytes() == before
    (tmp_path / "w.safetensors").unlink()
    assert tensor.sum() == 10000


def test_a_file_that_shrinks_while_it_is_read(tmp_path):
    save_file({"w": torch.ones(500)}, tmp_path / "w.safetensors")
    checkpoint = Checkpoint.open(tmp_path / "w.safetensors")
    (tmp_path / "w.safetensors").write_bytes(b"short")
    with pytest.raises(lr.LrmergeError, match="shorter"):
        checkpoint.read("w")


def test_storage_dtype_is_that_of_most_bytes():
    mixed = {"a": torch.ones(100, dtype=torch.bfloat16), "b": torch.ones(10), "c": torch.ones(500, dtype=torch.int64)}
    assert storage_dtype(Checkpoint.open(mixed)) is torch.bfloat16
    assert storage_dtype(Checkpoint.open({"c": torch.ones(5, dtype=torch.int64)})) is torch.float32


# Writing


def test_what_is_written_is_read_by_safetensors_itself(tmp_path):
    tensors = tiny.decoder() | {"half": torch.ones(3, dtype=torch.bfloat16), "byte": torch.ones(3, dtype=torch.uint8)}
    write_tensors(tmp_path / "w.safetensors", tensors, metadata={"a": "b"})
    again = load_file(tmp_path / "w.safetensors")
    assert again.keys() == tensors.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in tensors.items())
    infos, metadata = read_header(tmp_path / "w.safetensors")
    assert metadata == {"format": "pt", "a": "b"}
    assert all(info.offset % info.dtype.itemsize == 0 for info in infos.values())


def test_tensors_come_in_any_order_and_any_strides(tmp_path):
    wanted = {"a": torch.randn(3, 4), "b": torch.randn(4, 3), "c": torch.randn(2)}
    header = {name: (torch.float16, tuple(tensor.shape)) for name, tensor in wanted.items()}
    with SafetensorsWriter(tmp_path / "w.safetensors", header) as writer:
        writer.write("c", wanted["c"])
        writer.write("b", wanted["b"].mT.contiguous().mT)
        writer.write("a", wanted["a"])
        with pytest.raises(ValueError, match="promises"):
            writer.write("a", wanted["b"])
    infos, _ = read_header(tmp_path / "w.safetensors")
    assert all(torch.equal(read_tensor(infos[name]), tensor.half()) for name, tensor in wanted.items())


# Names


def test_unwrapped_names():
    assert unwrapped(["_orig_mod.a.w", "_orig_mod.b"]) == {"_orig_mod.a.w": "a.w", "_orig_mod.b": "b"}
    assert unwrapped(["module.a", "module.module.b"]) == {"module.a": "a", "module.module.b": "module.b"}
    assert unwrapped(["module.a", "b"]) == {"module.a": "module.a", "b": "b"}
    # Names that would collide keep what tells them apart.
    assert unwrapped(["_orig_mod.a", "a"]) == {"_orig_mod.a": "_orig_mod.a", "a": "a"}
    assert unwrapped([]) == {}


def test_aligned_names():
    with_head = {"model.layers.0.w": (2, 2), "model.norm": (2,), "head": (3, 2)}
    bare = {"layers.0.w": (2, 2), "norm": (2,)}
    assert aligned(bare, with_head) == {"layers.0.w": "model.layers.0.w", "norm": "model.norm"}
    assert aligned(with_head, bare) == {"model.layers.0.w": "layers.0.w", "model.norm": "norm", "head": "head"}
    assert aligned({"layers.0.w": (5, 5)}, with_head) == {"layers.0.w": "layers.0.w"}


# fp8


def quantised(weight: torch.Tensor, block: tuple[int, int]) -> tuple[torch.Tensor, torch.Tensor]:
    """fp8 values and the scales of their blocks, block by block as the formats describe it."""
    rows, columns = weight.shape
    grid = torch.empty(-(-rows // block[0]), -(-columns // block[1]))
    stored = torch.empty_like(weight)
    for i in range(grid.shape[0]):
        for j in range(grid.shape[1]):
            part = slice(i * block[0], (i + 1) * block[0]), slice(j * block[1], (j + 1) * block[1])
            grid[i, j] = weight[part].abs().max() / 448
            stored[part] = weight[part] / grid[i, j]
    return stored.to(torch.float8_e4m3fn), grid


FP8 = {
    "blocks of 128, cut at the edges": ((200, 300), (128, 128), "_scale_inv", None),
    "blocks of 128, whole": ((256, 384), (128, 128), "_scale_inv", None),
    "one block": ((100, 60), (128, 128), "_scale_inv", None),
    "blocks of 64": ((200, 130), (64, 64), "_scale_inv", None),
    "groups of a row": ((20, 96), (1, 24), "_scale", None),
    "a scale for each row": ((20, 50), (1, 50), "_scale", (20, 1)),
    "a scale for each row, flat": ((20, 50), (1, 50), "_scale", (20,)),
    "one scale": ((20, 50), (20, 50), "_scale", (1,)),
    "one scale, no axes": ((20, 50), (20, 50), "_scale", ()),
}


@pytest.mark.parametrize("case", FP8)
@pytest.mark.parametrize("scale_dtype", [torch.float32, torch.bfloat16])
def test_fp8_with_scales(case, scale_dtype):
    shape, block, suffix, scale_shape = FP8[case]
    weight = torch.randn(shape, generator=torch.Generator().manual_seed(0)) * torch.linspace(0.1, 3, shape[0])[:, None]
    stored, grid = quantised(weight, block)
    grid = grid.to(scale_dtype)
    spread = grid.float().repeat_interleave(block[0], 0)[: shape[0]].repeat_interleave(block[1], 1)[:, : shape[1]]
    scale = grid if scale_shape is None else grid.reshape(scale_shape)
    checkpoint = Checkpoint.open({"w.weight": stored, f"w.weight{suffix}": scale})
    read = checkpoint.read("w.weight")
    assert list(checkpoint.tensors) == ["w.weight"]
    assert read.dtype is torch.float32
    assert torch.equal(read, stored.float() * spread)
    assert float((read - weight).norm() / weight.norm()) < 0.04


def test_fp8_under_other_names():
    stored = torch.ones(4, 4).to(torch.float8_e4m3fn)
    checkpoint = Checkpoint.open({"w.weight": stored, "w.scale_weight": torch.tensor(2.0)})
    assert torch.equal(checkpoint.read("w.weight"), torch.full((4, 4), 2.0))
    assert Checkpoint.open({"w.weight": stored}).read("w.weight") is stored


def test_a_fine_tune_in_fp8_with_scales(tmp_path):
    """Against its own dequantised copy: no change; against the base: the change of that copy."""
    base = tiny.decoder()
    tuned = tiny.finetuned(base, rank=3)
    stored, scale = quantised(tuned[DOWN], (16, 16))
    fp8 = tiny.save(tmp_path / "fp8", tuned | {DOWN: stored, f"{DOWN}_scale_inv": scale})
    whole = tuned | {DOWN: Checkpoint.open(fp8).read(DOWN).clone()}
    assert lr.extract(whole, fp8, rank=4).states == {"unchanged": len(base)}
    report = lr.extract(base, fp8, rank=4)
    wanted = lr.extract(base, whole, rank=4)
    assert {m.name: m.squared_norm for m in report.modules} == {m.name: m.squared_norm for m in wanted.modules}


def test_a_lora_is_no_checkpoint():
    factors = {"base_model.model.a.lora_A.weight": torch.ones(2, 4)}
    with pytest.raises(MismatchError, match="adapter"):
        lr.extract(factors, tiny.decoder())
