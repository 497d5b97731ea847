"""Fused passes over large tensors: the delta of two checkpoints together with its norm.

Naive ``a.float() - b.float()`` writes two full-size temporaries and faults in fresh pages for each. Here
the work goes through blocks that stay in the cache, straight from the inputs (which may be memory-mapped
and read-only) into one result that the caller may reuse: cost O(size), one read of each input, one write.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any, NamedTuple, TypeAlias

from lrgpu import backend
from lrgpu.backend import Array

_CPU_BLOCK = 1 << 17  # elements: a float32 block and its scratch stay in the cache
_GPU_BLOCK = 1 << 26  # elements: large enough to fill a device, small beside its memory


Views: TypeAlias = tuple[Array, Array, Array]  # finetuned, base, out


class Delta(NamedTuple):
    """matrix: finetuned - base, float32 (float64 for float64 inputs). squared_norm: its sum of squares."""

    matrix: Array
    squared_norm: float


def delta(finetuned: Array, base: Array, *, out: Array | None = None) -> Delta:
    """``finetuned - base``, formed exactly in float32, and its squared Frobenius norm.

    Args:
        finetuned: any shape and float dtype, any strides; only read.
        base: the same shape, any float dtype.
        out: where to write, the same shape in the result's dtype. Without it a new array is made in the
            memory order of ``finetuned``, so a transposed input gives a transposed result.

    Returns:
        The difference in float32, or float64 if either input is float64. The squared norm is accurate to
        about 1e-7 and is non-finite exactly when the difference holds a NaN or an infinity.

    Raises:
        ValueError: the shapes differ, or ``out`` does not fit.
        TypeError: not an array of a known library.
    """
    library = backend.of(finetuned)
    if finetuned.shape != base.shape:
        raise ValueError(f"shapes differ: finetuned {tuple(finetuned.shape)}, base {tuple(base.shape)}")
    xp = library.xp
    dtype = xp.float64 if xp.float64 in (finetuned.dtype, base.dtype) else xp.float32
    if out is not None and (out.shape != finetuned.shape or out.dtype != dtype):
        raise ValueError(f"out must be {tuple(finetuned.shape)} {dtype}, got {tuple(out.shape)} {out.dtype}")

    if out is None:
        out = _empty_like(finetuned, dtype)
    block = _CPU_BLOCK if library.on_cpu(finetuned) else _GPU_BLOCK
    scratch = library.empty((2, block), dtype, finetuned)
    total = 0.0
    for f, b, o in _pieces(_in_memory_order(finetuned, base, out), block):
        size = math.prod(o.shape)
        if size > block:  # a single row that is longer than a block
            scratch, block = library.empty((2, size), dtype, finetuned), size
        left, right = (s[:size].reshape(o.shape) for s in scratch)
        difference = o if library.contiguous(o) else left
        right[...] = b
        difference[...] = f
        xp.subtract(difference, right, out=difference)
        xp.multiply(difference, difference, out=right)
        total += _sum_of_squares(difference, right)
        if difference is left:  # other strides than the inputs: turned here, while it is in the cache
            o[...] = left
    return Delta(out, total)


def _empty_like(array: Array, dtype: Any) -> Array:
    """A new array in the memory order of ``array``: as it is, or with its last two axes turned."""
    library = backend.of(array)
    if len(array.shape) >= 2 and not library.contiguous(array) and library.contiguous(array.swapaxes(-1, -2)):
        return library.empty(tuple(array.swapaxes(-1, -2).shape), dtype, array).swapaxes(-1, -2)
    return library.empty(tuple(array.shape), dtype, array)


def _in_memory_order(finetuned: Array, base: Array, out: Array) -> Views:
    """The three alike: flat if all are contiguous, else with the rows of ``finetuned`` contiguous if they can."""
    library = backend.of(finetuned)
    if len(finetuned.shape) >= 2 and library.contiguous(finetuned.swapaxes(-1, -2)):
        finetuned, base, out = (x.swapaxes(-1, -2) for x in (finetuned, base, out))
    if all(library.contiguous(x) for x in (finetuned, base, out)):
        return finetuned.reshape(-1), base.reshape(-1), out.reshape(-1)
    return finetuned, base, out


def _pieces(arrays: Views, block: int) -> Iterator[Views]:
    """Matching views into the three arrays, of about ``block`` elements each."""
    shape = arrays[0].shape
    if len(shape) > 2:
        for slices in zip(*arrays, strict=True):
            yield from _pieces(slices, block)
        return
    step = block if len(shape) == 1 else max(1, block // max(1, shape[1]))
    for start in range(0, shape[0], step):
        finetuned, base, out = (x[start : start + step] for x in arrays)
        yield finetuned, base, out


def _sum_of_squares(block: Array, squares: Array) -> float:
    """Sum of the squares of a block. Both libraries sum pairwise, so float32 keeps 1e-8 within a block."""
    library = backend.of(block)
    total = float(squares.sum())
    if 1e-30 < total < math.inf or not block.any():
        return total
    # Not finite, or squares that under- or overflow float32: float64 tells which.
    return float((library.cast(block, library.xp.float64) ** 2).sum())
