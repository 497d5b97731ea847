"""The k-th smallest of many magnitudes, and which are the largest, without sorting.

Non-negative floats are ordered as their bit patterns are, so a radix search finds the exact order statistic: count
the leading 12 bits, gather the few numbers of the bucket that holds the rank, go on with those. Two reads in blocks
that stay in the cache: the numbers may lie in many arrays, or be made anew for each read, and need never be in one.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch

from lrgpu import backend
from lrgpu.backend import Array

_CPU_BLOCK = 1 << 17  # elements; a block and its digits stay in the cache
_DIGIT = 12  # bits counted per pass: their counters stay in the fastest cache
_GATHERED = 1 << 20  # numbers that may be held


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
    threshold, rank, equals, gathered = _search(parts, size - count + 1)
    if rank == 1 or math.isnan(threshold):
        return Cut(threshold, math.inf)
    wanted = equals - rank + 1
    for places in _equal_to(threshold, parts, gathered):
        if places.shape[0] >= wanted:
            return Cut(threshold, int(places[wanted - 1]) + 1)
        wanted -= places.shape[0]
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


def patterns(magnitudes: Array) -> Array:
    """The bit patterns of non-negative floats, flat, as integers: ordered as the numbers are."""
    xp = backend.of(magnitudes).xp
    return magnitudes.reshape(-1).view({2: xp.int16, 4: xp.int32, 8: xp.int64}[magnitudes.dtype.itemsize])


def value_of(pattern: int, dtype: Any) -> float:
    """The number of a float dtype, of either library, that has this bit pattern."""
    integers = {2: torch.int16, 4: torch.int32, 8: torch.int64}[dtype.itemsize]
    floats = getattr(torch, str(dtype).removeprefix("torch."))
    return float(torch.tensor(pattern, dtype=integers).view(floats))


class _Gathered(NamedTuple):
    """Some of the numbers, in order: their bit patterns, and their places among all."""

    patterns: Array
    places: Array


class _Found(NamedTuple):
    """value: the order statistic. rank: which it is, from 1, of the ``equals`` numbers of this value; all of those are
    among ``gathered``, where anything was."""

    value: float
    rank: int
    equals: int
    gathered: _Gathered | None


def _search(parts: Iterable[Array], k: int) -> _Found:
    """Radix search over the numbers' bit patterns; what is left of them is gathered once it is little."""
    dtype = next((part.dtype for part in parts), torch.float32)
    bits = 8 * dtype.itemsize - 1  # without the sign
    prefix, open_bits, equals = 0, bits, 0
    gathered: _Gathered | None = None
    while open_bits:
        width = min(_DIGIT, open_bits)
        shift = open_bits - width
        counts: Any = None
        for block in _blocks(parts) if gathered is None else [gathered.patterns]:
            xp = backend.of(block).xp
            digits = block >> shift
            if open_bits < bits:  # numbers of other buckets are counted on both sides: faster than leaving them out
                digits = xp.clip(digits - (prefix << width), -1, 1 << width) + 1
                found = xp.bincount(digits, minlength=(1 << width) + 2)[1:-1]
            else:
                found = xp.bincount(digits, minlength=1 << width)
            counts = found if counts is None else counts + found
        total = 0 if counts is None else int(counts.sum())
        if not 1 <= k <= total:
            raise ValueError(f"k must be between 1 and {total}, got {k}")
        below = backend.of(counts).xp.cumsum(counts, 0)
        digit = int((below < k).sum())
        k -= int(below[digit - 1]) if digit else 0
        prefix, equals, open_bits = prefix << width | digit, int(counts[digit]), shift  # type: ignore[index]
        if shift and gathered is None and equals <= _GATHERED:
            gathered = _in_bucket(parts, prefix, shift, equals)
    return _Found(value_of(prefix, dtype), k, equals, gathered)


def _in_bucket(parts: Iterable[Array], prefix: int, shift: int, count: int) -> _Gathered:
    """The ``count`` numbers whose bits above ``shift`` are ``prefix``, with their places."""
    found: _Gathered | None = None
    place = filled = 0
    for block in _blocks(parts):
        library = backend.of(block)
        if found is None:
            found = _Gathered(*(library.empty((count,), dtype, block) for dtype in (block.dtype, library.xp.int64)))
        [offsets] = library.xp.where((block >> shift) == prefix)
        end = filled + offsets.shape[0]
        found.patterns[filled:end] = block[offsets]
        found.places[filled:end] = offsets + place
        place, filled = place + block.shape[0], end
    assert found is not None
    return found


def _equal_to(value: float, parts: Iterable[Array], gathered: _Gathered | None) -> Iterator[Array]:
    """The places of the numbers equal to ``value``, in order."""
    if gathered is not None:
        dtype = next(iter(parts)).dtype
        yield gathered.places[gathered.patterns.view(dtype) == value]
        return
    place = 0
    for part in parts:
        flat = part.reshape(-1)
        yield backend.of(flat).xp.where(flat == value)[0] + place
        place += flat.shape[0]


def _blocks(parts: Iterable[Array]) -> Iterator[Array]:
    """The bit patterns of all numbers, as integers, in blocks."""
    for part in parts:
        flat = patterns(part)
        step = _CPU_BLOCK if backend.of(part).on_cpu(part) else max(1, flat.shape[0])
        for start in range(0, flat.shape[0], step):
            yield flat[start : start + step]
