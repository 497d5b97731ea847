"""Quantised weights: dequantise what a scale beside it explains, refuse the rest by name.

fp8 with scales (DeepSeek's ``weight_scale_inv`` per 128 x 128 block, per-channel or per-tensor ``weight_scale``) is
a product and is undone exactly, in float32. GPTQ, AWQ, bitsandbytes, mxfp4 and packed integers are not.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.safetensors import TensorInfo
from mergekit_lr.errors import FormatError

FP8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# The tensor that only a format of this name writes beside, or in place of, a weight.
MARKS = {
    ".qweight": "GPTQ or AWQ",
    ".weight_packed": "compressed-tensors",
    ".weight.absmax": "bitsandbytes 4-bit",
    ".SCB": "bitsandbytes 8-bit",
    "_blocks": "mxfp4",
}


class Scale(NamedTuple):
    """The tensor that scales a quantised one, and the block of it that one entry covers."""

    name: str
    info: TensorInfo
    block: tuple[int, int]


def find_scales(tensors: Mapping[str, TensorInfo]) -> dict[str, Scale]:
    """For each fp8 weight that has one: its scale."""
    scales: dict[str, Scale] = {}
    for name, info in tensors.items():
        if info.dtype not in FP8 or len(info.shape) != 2:
            continue
        if (found := _scale_of(name, tensors)) is not None:
            scale = tensors[found]
            grid = (*scale.shape, 1, 1)[: max(2, len(scale.shape))]
            block = [_block(size, count) for size, count in zip(info.shape, grid, strict=False)]
            if len(grid) != 2 or 0 in block:
                raise FormatError(
                    f"{scale.file}: scale {found} of shape {list(scale.shape)} does not fit the fp8 weight {name} of "
                    f"shape {list(info.shape)}; give the model in bf16, fp16 or fp32"
                )
            scales[name] = Scale(found, scale, (block[0], block[1]))
    return scales


def _scale_of(name: str, tensors: Mapping[str, TensorInfo]) -> str | None:
    """The tensor that scales the weight ``name``: DeepSeek's, compressed-tensors', ComfyUI's name for it."""
    names = (f"{name}_scale_inv", f"{name}_scale", f"{name.removesuffix('weight')}scale_weight")
    return next((found for found in names if found in tensors), None)


def _block(size: int, count: int) -> int:
    """Side of the blocks when ``count`` of them cover ``size``: a power of two, or even parts; 0 where neither."""
    side = 1
    while count and -(-size // side) > count:
        side *= 2
    if -(-size // side) == count:
        return side
    return size // count if count and size % count == 0 else 0


def dequantise(weight: Tensor, scale: Tensor, block: tuple[int, int]) -> Tensor:
    """``weight`` (m, n) in fp8 times its scale, in float32; ``scale`` has one entry per block of ``block``."""
    grid = scale.float().reshape((*scale.shape, 1, 1)[:2] if scale.dim() < 2 else scale.shape)
    rows, columns = weight.shape
    spread = grid.repeat_interleave(block[0], 0)[:rows].repeat_interleave(block[1], 1)[:, :columns]
    return weight.float() * spread


def refuse_quantised(ref: str, tensors: Mapping[str, TensorInfo]) -> None:
    """Raise for a checkpoint whose weights are no numbers that can be subtracted.

    Raises:
        FormatError: naming the first such tensor and its format.
    """
    for name, info in tensors.items():
        kind = next((kind for mark, kind in MARKS.items() if name.endswith(mark)), None)
        if info.dtype in FP8 and len(info.shape) != 2 and _scale_of(name, tensors) is not None:
            kind = "fp8 in a stack"
        if kind is None and name.endswith(".weight") and len(info.shape) >= 2 and not info.dtype.is_floating_point:
            kind = str(info.dtype).removeprefix("torch.")
        if kind is not None:
            raise FormatError(
                f"{ref}: tensor {name} is quantised ({kind}), it has no delta; give the model in bf16, fp16 or "
                "fp32 (a quantised one can be dequantised with transformers and saved again)"
            )
