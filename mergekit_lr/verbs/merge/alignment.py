"""One table of several models, embeddings or head, brought to the rows of the result's vocabulary while it is read.

For T models and R rows of the result: a model has a row under its own number, ``own (T, R)``, or takes the row that
all models without one share, which comes from one of them, their average, the mean of the model's rows, or is zero.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.verbs.merge.sources import Input

# What stands for a model in ``donor`` where the row is no single model's.
EXACT, ZERO, AVERAGE, MEAN = -1, -2, -3, -4
STEP = 4096  # rows at a time of a sum over all


@dataclass(frozen=True, eq=False)
class Alignment:
    """Where every row of the result comes from.

    inputs: the T tables. own: int64 (T, R), each model's row, -1 where it takes the shared one. held: the same before
    the recipe forced a row on all models. donor: int64 (R,), the place in ``inputs`` of the model whose ``row`` (R,) is
    shared, or one of ``EXACT`` (none is needed), ``ZERO``, ``AVERAGE`` and ``MEAN``. kinds: in words, to masks.
    """

    inputs: tuple[Input, ...]
    own: Tensor
    held: Tensor
    donor: Tensor
    row: Tensor
    kinds: Mapping[str, Tensor]

    @property
    def rows(self) -> int:
        """Of the result."""
        return len(self.donor)

    @property
    def dtype(self) -> torch.dtype:
        """Of aligned tables: the widest of the models'; float32 at least where rows are computed."""
        found = reduce(torch.promote_types, (item.header[0] for item in self.inputs))
        computed = bool(((self.donor == AVERAGE) | (self.donor == MEAN)).any())
        return torch.promote_types(found, torch.float32) if computed else found

    def nbytes(self, tables: int) -> int:
        """Bytes that ``tables`` aligned tables take, with what they share and a copy that changes a dtype."""
        return (tables + 1) * self.rows * self.width * self.dtype.itemsize

    @property
    def width(self) -> int:
        """Elements of a row."""
        return math.prod(self.inputs[0].header[1][1:])

    def open(self, wanted: Sequence[Input]) -> Tables:
        """The tables ``wanted``, some of ``inputs``, to be read in parts."""
        opened = Tables(self, tuple(item.source.read(item.name) for item in self.inputs), {})
        if bool((self.donor == MEAN).any()):
            opened.means.update({item: opened.mean(item) for item in wanted})
        return opened

    def read(self, wanted: Sequence[Input]) -> list[Tensor]:
        """The tables ``wanted``, some of ``inputs``, whole: each (R, ...) in ``dtype``."""
        opened, shape = self.open(wanted), (self.rows, *self.inputs[0].header[1][1:])
        return [opened.part(item, 0, self.rows * self.width).view(shape) for item in wanted]

    def to_json(self) -> dict[str, dict[str, Any]]:
        """How many rows, and which, come from where."""
        return {kind: {"rows": int(where.sum()), "ranges": in_ranges(where)} for kind, where in self.kinds.items()}


@dataclass(frozen=True, eq=False)
class Tables:
    """The tables of an alignment, mapped from their files; rows are put in order as they are read.

    means: of the tables that are read, the mean of all rows with a token, where some row needs it.
    """

    alignment: Alignment
    tables: tuple[Tensor, ...]
    means: dict[Input, Tensor]

    def part(self, item: Input, start: int, stop: int) -> Tensor:
        """Elements [start, stop) of the aligned table ``item``, counted flat: (stop - start,)."""
        width = self.alignment.width
        first, end = start // width, -(-stop // width)
        return self._rows(item, torch.arange(first, end)).reshape(-1)[start - first * width : stop - first * width]

    def mean(self, item: Input) -> Tensor:
        """The mean of the rows of ``item`` that have a token, (1, ...), summed in float64."""
        used = (self.alignment.donor != MEAN).nonzero()[:, 0]
        total = torch.zeros((1, *self.tables[0].shape[1:]), dtype=torch.float64)
        for rows in used.split(STEP):
            total += self._rows(item, rows).sum(0, keepdim=True, dtype=torch.float64)
        return (total / len(used)).to(self.alignment.dtype)

    def _rows(self, item: Input, at: Tensor) -> Tensor:
        """Rows ``at`` of the aligned table ``item``, (len(at), ...)."""
        place = self.alignment.inputs.index(item)
        own = self.alignment.own[place, at]
        made = self.tables[place].index_select(0, own.clamp(min=0)).to(self.alignment.dtype)
        lacking = (own < 0).nonzero()[:, 0]
        if len(lacking):
            made[lacking] = self._shared(at[lacking], self.means.get(item))
        return made

    def _shared(self, at: Tensor, mean: Tensor | None) -> Tensor:
        """Rows ``at`` of the result as models have them that take the shared ones, (len(at), ...)."""
        alignment = self.alignment
        donor, row, held = alignment.donor[at], alignment.row[at], alignment.held[:, at]
        shared = torch.zeros((len(at), *self.tables[0].shape[1:]), dtype=alignment.dtype)
        averaged = donor == AVERAGE
        for place, table in enumerate(self.tables):
            mine = donor == place
            shared[mine] = table[row[mine]].to(alignment.dtype)
            among = averaged & (held[place] >= 0)
            shared[among] += table[held[place, among]].to(alignment.dtype)
        count = (held[:, averaged] >= 0).sum(0).to(alignment.dtype)
        shared[averaged] /= count.reshape(-1, *(1 for _ in shared.shape[1:]))
        if mean is not None:
            shared[donor == MEAN] = mean
        return shared


def in_ranges(where: Tensor, most: int = 20) -> str:
    """The true places of a mask, ``0-3, 7``; after ``most`` ranges only how many there are more.

    >>> in_ranges(torch.tensor([True, True, False, True]))
    '0-1, 3'
    """
    edge = torch.zeros(1, dtype=torch.int)
    change = torch.diff(where.int(), prepend=edge, append=edge)
    first, end = (change == 1).nonzero()[:, 0].tolist(), (change == -1).nonzero()[:, 0].tolist()
    parts = [f"{a}-{b - 1}" if b - a > 1 else str(a) for a, b in zip(first, end, strict=True)]
    return ", ".join([*parts[:most], f"{len(parts) - most} more ranges"] if len(parts) > most else parts)
