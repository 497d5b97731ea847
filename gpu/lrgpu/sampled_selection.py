"""Which are the largest of many magnitudes, of several rows at once, in one read: with a sample of them.

A sample says between which two numbers a rank very likely lies. One read counts what is up to either of the two and
gathers what is between, from which the order statistic is selected exactly. Where many numbers are equal, as those on
a coarse grid are, one of the two is most often the number itself, and the counts show it. A rank that is elsewhere
after all is found by radix search: a sample never changes a result.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy

from lrgpu import backend
from lrgpu.backend import Array
from lrgpu.selection import EVERYTHING, NOTHING, Cut, cut, patterns, value_of

_SIGMAS = 5  # how far from its place in the sample a rank is looked for
_GATHERED = 1 << 21  # numbers of a row that may be held


def cuts(blocks: Sequence[Sequence[Array]], counts: Sequence[int], size: int, sample: Sequence[Array]) -> list[Cut]:
    """For each row of magnitudes where its largest part from the others, as :func:`lrgpu.selection.cut` says it.

    Args:
        blocks: the magnitudes in order, each block a sequence with a flat array for every row; taken again where one
            read is not enough. On a CPU blocks that stay in the cache are fastest.
        counts: how many are the largest of each row.
        size: how many magnitudes a row has.
        sample: some magnitudes of each row (pieces, n), neighbours in a piece, pieces from all over the row.
    """
    result = [EVERYTHING if count > 0 else NOTHING for count in counts]
    rows = {t: _Row(size - count + 1, size, sample[t]) for t, count in enumerate(counts) if 0 < count < size}
    for block in blocks if rows else ():
        for t, row in rows.items():
            row.add(block[t])
    for t, row in rows.items():
        found = row.found()
        if isinstance(found, _Scattered):
            result[t] = found.within(blocks[found.block][t])
        else:
            result[t] = found or cut(_Only(blocks, t), counts[t], size)
    return result


class _Scattered(NamedTuple):
    """The pattern of a row's threshold; the last of its equals that belongs is number ``wanted`` of those in a block.

    start: the place of the block's first number.
    """

    pattern: int
    block: int
    start: int
    wanted: int

    def within(self, block: Array) -> Cut:
        """The cut, from the row's magnitudes in that block."""
        [offsets] = backend.of(block).xp.where(patterns(block) == self.pattern)
        return Cut(value_of(self.pattern, block.dtype), self.start + int(offsets[self.wanted - 1]) + 1)


@dataclass(frozen=True)
class _Only:
    """One row of the blocks."""

    blocks: Sequence[Sequence[Array]]
    t: int

    def __iter__(self) -> Iterator[Array]:
        return (block[self.t] for block in self.blocks)


class _Row:
    """What is known of one row: how many bit patterns are up to ``low``, and which are between that and ``high``.

    Where the sample has several numbers that are equal to one of the two, all that are so are counted in each block.
    """

    def __init__(self, rank: int, size: int, sample: Array):
        self.rank, self.dtype = rank, sample.dtype
        bits = backend.of(sample).host(patterns(sample)).reshape(sample.shape)
        self.low, self.high, self.coarse = _bracket(bits, (rank - 0.5) / size)
        self.starts = [0]  # of the blocks
        self.up_to_low = self.between = 0
        self.at_low: list[int] = []
        self.at_high: list[int] = []
        self.gathered: list[tuple[Any, Any]] = []  # patterns and places, on the host

    def add(self, block: Array) -> None:
        """Count and gather in the next block, unless there is too much to gather."""
        if self.between > _GATHERED:
            return
        library = backend.of(block)
        bits = patterns(block)
        bits, xp = (bits.numpy(), numpy) if library.on_cpu(block) else (bits, library.xp)
        low, below_high = bits <= self.low, bits < self.high
        [offsets] = xp.where(low ^ below_high)
        found = bits[offsets], offsets + self.starts[-1]
        self.gathered.append(found if xp is numpy else tuple(map(library.host, found)))
        up_to_low, between = int(xp.count_nonzero(low)), offsets.shape[0]
        if self.coarse:
            self.at_low.append(up_to_low - int(xp.count_nonzero(bits < self.low)))
            self.at_high.append(int(xp.count_nonzero(bits <= self.high)) - up_to_low - between)
        self.up_to_low += up_to_low
        self.between += between
        self.starts.append(self.starts[-1] + bits.shape[0])

    def found(self) -> Cut | _Scattered | None:
        """The cut, or where its end is to be looked for; None where the rank is not where it was looked for."""
        if self.between > _GATHERED:
            return None
        rank, at_low, at_high = self.rank - self.up_to_low, sum(self.at_low), sum(self.at_high)
        if -at_low < rank <= 0:
            return self._end(self.low, self.at_low, rank + at_low)
        if self.between < rank <= self.between + at_high:
            return self._end(self.high, self.at_high, rank - self.between)
        if not 0 < rank <= self.between:
            return None
        bits, places = (numpy.concatenate(parts) for parts in zip(*self.gathered, strict=True))
        pattern = numpy.partition(bits, rank - 1)[rank - 1]
        equal = places[bits == pattern]
        rank -= int(numpy.count_nonzero(bits < pattern))
        return Cut(value_of(int(pattern), self.dtype), math.inf if rank == 1 else int(equal[-rank]) + 1)

    def _end(self, pattern: int, counts: list[int], rank: int) -> Cut | _Scattered:
        """A threshold of ``counts`` numbers in the blocks, of which the last ``rank`` - 1 do not belong."""
        if rank == 1:
            return Cut(value_of(pattern, self.dtype), math.inf)
        wanted, block = sum(counts) - rank + 1, 0
        while wanted > counts[block]:
            wanted, block = wanted - counts[block], block + 1
        return _Scattered(pattern, block, self.starts[block], wanted)


def _bracket(sample: Any, share: float) -> tuple[int, int, bool]:
    """Two patterns between which the number at ``share`` of all very likely is; whether the sample repeats either.

    Args:
        sample: patterns (pieces, n). Neighbours are alike, so how far off the sample may be shows in how the pieces
            differ.
    """
    ordered = numpy.sort(sample.reshape(-1))
    size = ordered.shape[0]
    guess = ordered[min(int(share * size), size - 1)]
    spread = (sample <= guess).mean(-1).std() / sample.shape[0] ** 0.5
    reach = _SIGMAS * max(spread, (share * (1 - share) / size) ** 0.5)
    low, high = math.floor((share - reach) * size) - 1, math.ceil((share + reach) * size) + 1
    least = int(ordered[low]) if low >= 0 else -1
    most = int(ordered[high]) if high < size else int(numpy.iinfo(ordered.dtype).max)
    repeated = any(numpy.count_nonzero(ordered == edge) > 1 for edge in (least, most))
    return least, max(most, least + 1), repeated
