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
        return (tables + 1) * self.rows * math.prod(self.inputs[0].header[1][1:]) * self.dtype.itemsize

    def read(self, wanted: Sequence[Input]) -> list[Tensor]:
        """The tables ``wanted``, some of ``inputs``, each (R, ...) in ``dtype``; every input is read once."""
        tables = [item.source.read(item.name) for item in self.inputs]
        shared = self._shared(tables)
        places = [self.inputs.index(item) for item in wanted]
        made: dict[int, Tensor] = {}
        for place in range(len(tables)):
            if place in places:
                made[place] = self._aligned(tables[place], self.own[place], shared)
            tables[place] = torch.empty(0)  # what was read goes as soon as it is in order
        return [made[place] for place in places]

    def _shared(self, tables: Sequence[Tensor]) -> Tensor:
        """The rows that models share, (needed, ...), for ``donor`` other than ``EXACT``."""
        needed = (self.donor != EXACT).nonzero()[:, 0]
        donor, row = self.donor[needed], self.row[needed]
        shared = torch.zeros((len(needed), *tables[0].shape[1:]), dtype=self.dtype)
        averaged = donor == AVERAGE
        has = self.held[:, needed[averaged]] >= 0
        for place, table in enumerate(tables):
            mine = donor == place
            shared[mine] = table[row[mine]].to(self.dtype)
            if bool(averaged.any()):
                at = averaged.nonzero()[has[place], 0]
                shared[at] += table[self.held[place, needed[at]]].to(self.dtype)
        if bool(averaged.any()):
            count = has.sum(0).to(self.dtype)
            shared[averaged] /= count.reshape(-1, *(1 for _ in shared.shape[1:]))
        return shared

    def _aligned(self, table: Tensor, own: Tensor, shared: Tensor) -> Tensor:
        made = table.index_select(0, own.clamp(min=0)).to(self.dtype)
        lacking = own < 0
        made[lacking] = shared[lacking[self.donor != EXACT]]
        unused = self.donor == MEAN
        if bool(unused.any()):
            made[unused] = 0
            made[unused] = (made.sum(0, dtype=torch.float64) / int((~unused).sum())).to(made.dtype)
        return made

    def to_json(self) -> dict[str, dict[str, Any]]:
        """How many rows, and which, come from where."""
        return {kind: {"rows": int(where.sum()), "ranges": in_ranges(where)} for kind, where in self.kinds.items()}


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
