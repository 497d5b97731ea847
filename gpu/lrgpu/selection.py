"""The k-th smallest of many magnitudes, and which are the largest, without sorting.

Non-negative floats are ordered as their bit patterns are, so a radix search finds the exact order statistic:
count the leading 16 bits, keep the bucket that holds the rank, count the next 16. Two reads of float32 (four
of float64) in blocks that stay in the cache, and no copy: the numbers may lie in many arrays, or be made anew for
each read, and need never be in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lrgpu import backend
from lrgpu.backend import Array

_CPU_BLOCK = 1 << 17  # elements; a block and its digits stay in the cache
_DIGIT = 16  # bits counted per pass


class Cut(NamedTuple):
    """Where the largest of a row of magnitudes part from the others.

    Above ``threshold`` all belong to the largest; of those equal to it, the ones at a place before ``end``.
    """

    threshold: float
    end: float


NOTHING, EVERYTHING = Cut(math.inf, 0), Cut(-1.0, 0)


def kth_smallest(parts: Iterable[Array], k: int) -> float:
    """The k-th smallest number, k = 1 ... n, of all that ``parts`` hold together.

    Args:
        parts: arrays of any shape, of one float dtype, without negative numbers; gone through several times.
        k: the rank; 1 is the smallest.

    Raises:
        ValueError: ``k`` is not between 1 and the number of elements.
    """
    return _search(parts, k).value


def cut(parts: Iterable[Array], count: int, size: int) -> Cut:
    """Where the ``count`` largest of ``size`` magnitudes part from the others: exactly so many, the first among equals.

    Args:
        parts: the magnitudes in order, as for :func:`kth_smallest`.
        count: how many are the largest. size: how many there are.
    """
    if not 0 < count < size:
        return EVERYTHING if count > 0 else NOTHING
    threshold, rank, equals = _search(parts, size - count + 1)
    if rank == 1:
        return Cut(threshold, math.inf)
    wanted, place = equals - rank + 1, 0
    for part in parts:
        equal = part.reshape(-1) == threshold
        found = int(equal.sum())
        if found >= wanted:
            return Cut(threshold, place + int((backend.of(equal).xp.cumsum(equal, 0) < wanted).sum()) + 1)
        wanted, place = wanted - found, place + equal.shape[0]
    raise ValueError("the magnitudes changed while they were read")


def largest(magnitudes: Array, counts: int | Sequence[int]) -> Array:
    """Which are the ``counts`` largest of each row: exactly so many, the first ones among equals.

    Args:
        magnitudes: (b, n), non-negative, float32 or float64 (half formats work too).
        counts: how many to take; one number, or one for each row.

    Returns:
        Booleans (b, n).
    """
    rows, columns = magnitudes.shape
    xp = backend.of(magnitudes).xp
    mask = backend.of(magnitudes).empty((rows, columns), xp.bool if xp is torch else bool, magnitudes)
    for row, count in enumerate([counts] * rows if isinstance(counts, int) else counts):
        numbers = magnitudes[row]
        threshold, end = cut([numbers], count, columns)
        mask[row] = numbers > threshold
        here = columns if end == math.inf else int(end)
        mask[row, :here] |= numbers[:here] == threshold
    return mask


class _Found(NamedTuple):
    """value: the order statistic. rank: which it is, from 1, of the ``equals`` numbers of this value."""

    value: float
    rank: int
    equals: int


def _search(parts: Iterable[Array], k: int) -> _Found:
    """Radix search, 16 bits of the numbers' patterns at a time."""
    dtype = next((part.dtype for part in parts), torch.float32)
    prefix, shift, equals = 0, 8 * dtype.itemsize - _DIGIT, 0
    first = True
    while shift >= 0:
        counts: Any = None
        for block in _blocks(parts):
            xp = backend.of(block).xp
            digits = block >> shift
            if first:
                found = xp.bincount(digits, minlength=1 << _DIGIT)
            else:  # numbers of other buckets are counted on both sides: far faster than leaving them out
                digits = xp.clip(digits - (prefix << _DIGIT), -1, 1 << _DIGIT) + 1
                found = xp.bincount(digits, minlength=(1 << _DIGIT) + 2)[1:-1]
            counts = found if counts is None else counts + found
        total = 0 if counts is None else int(counts.sum())
        if not 1 <= k <= total:
            raise ValueError(f"k must be between 1 and {total}, got {k}")
        below = backend.of(counts).xp.cumsum(counts, 0)
        digit = int((below < k).sum())
        k -= int(below[digit - 1]) if digit else 0
        prefix, equals = prefix << _DIGIT | digit, int(counts[digit])  # type: ignore[index]
        shift, first = shift - _DIGIT, False
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    floats = getattr(torch, str(dtype).removeprefix("torch."))
    return _Found(float(torch.tensor(prefix, dtype=integers).view(floats)), k, equals)


def _blocks(parts: Iterable[Array]) -> Iterator[Array]:
    """The bit patterns of all numbers, as integers, in blocks."""
    for part in parts:
        library = backend.of(part)
        integers = {2: library.xp.int16, 4: library.xp.int32, 8: library.xp.int64}[part.dtype.itemsize]
        flat = part.reshape(-1).view(integers)
        step = _CPU_BLOCK if library.on_cpu(part) else max(1, flat.shape[0])
        for start in range(0, flat.shape[0], step):
            yield flat[start : start + step]
