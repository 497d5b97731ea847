"""What adapters do to one weight, on any rows of it: W + sum_i w_i delta_i, in float32.

A weight is seen in its own layout as rows (R, C): a linear layer (d_out, d_in), GPT-2's Conv1D (d_in, d_out), a table
(rows, width), a convolution flat behind its first axis, one expert of a stack, a vector as (n, 1). Low-rank changes,
differences in full, replaced rows and DoRA on a linear layer need nothing but the rows at hand, so a table larger
than memory is done a few rows at a time. What needs the whole matrix says so (``Change.whole``).

A change that is no difference (a replaced tensor, DoRA) counts with its weight as the difference that it makes:
W + w (T(W) - W), T(W) itself for w = 1.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.site import as_matrix, wide
from mergekit_lr.checkpoint.parameter import Kind, Parameter

STACKED = (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED)


@dataclass(frozen=True, eq=False)
class Change:
    """What one adapter does to one parameter.

    weight: the user's factor. delta: factors, as in ``AdaptedWeight``. magnitude: DoRA's, of the base changed by
    ``delta``. added: a difference in the parameter's own shape. saved: a replacement in full, which the rest then
    changes. rows: (indices, rows) that replace rows of a table. made: gives the difference as a matrix (d_out, d_in)
    or a vector, for types whose change is not in their file but computed, most of them from the base's weight.
    """

    weight: float
    delta: LowRank | None = None
    magnitude: Tensor | None = None
    added: Tensor | None = None
    saved: Tensor | None = None
    rows: tuple[list[int], Tensor] | None = None
    made: Callable[[], LowRank | Tensor | None] | None = None

    @property
    def additive(self) -> bool:
        """Whether it is a difference, the same whatever it is added to."""
        return self.saved is None and self.magnitude is None and self.rows is None

    def whole(self, kind: Kind) -> bool:
        """Whether it needs the whole matrix at once."""
        by_channel = self.magnitude is not None and self.magnitude.ndim == 2 and self.magnitude.shape[0] == 1
        return self.made is not None or by_channel or (self.magnitude is not None and kind.turned)

    @property
    def rank(self) -> int:
        """Columns that its factors bring into a product."""
        return self.delta.rank if self.delta is not None else 0


class Part(NamedTuple):
    """Rows ``start:stop`` of matrix ``index`` of ``parameter``."""

    parameter: Parameter
    index: int
    start: int
    stop: int


class Changed(NamedTuple):
    """rows: the new rows (n, C). squared_norm: of their difference to the old ones."""

    rows: Tensor
    squared_norm: float


def own_shape(parameter: Parameter) -> tuple[int, int]:
    """(R, C) of one matrix of ``parameter`` in its own layout."""
    stacked = parameter.matrices > 1 or parameter.kind in STACKED
    shape = parameter.shape[1:] if stacked else parameter.shape
    return (shape[0] if shape else 1), math.prod(shape[1:])


def changed(old: Tensor, part: Part, changes: Sequence[Change], *, out: Tensor) -> Changed:
    """The rows of ``part`` after all ``changes``.

    Args:
        old: (n, C), the base's rows, any dtype. out: (n, C), float32 or float64: memory for the result; its dtype is
            that of the arithmetic.

    Returns:
        The new rows, in ``out`` where only differences are added, and the squared norm of the whole change.
    """
    base = old.to(out.dtype)
    difference = _difference([change for change in changes if change.additive], part, out)
    replacing = [change for change in changes if not change.additive]
    if not replacing:
        norm = squared(difference)
        return Changed(difference.add_(base), norm)
    rest = 1.0 - sum(change.weight for change in replacing)
    result = base * rest if rest else torch.zeros_like(base)
    for change in replacing:
        result += change.weight * _applied(base, part, change)
    if any(change.additive for change in changes):
        result += difference
    return Changed(result, squared(result - base))


def replacement(part: Part, change: Change, *, dtype: torch.dtype, device: torch.device) -> Tensor:
    """The rows of ``part`` where the base has no such rows: what ``change`` saved, and its factors on top."""
    assert change.saved is not None
    saved = _rows_of(change.saved, part).to(device, dtype)
    return _applied(saved, part, replace(change, saved=None))


def squared(rows: Tensor) -> float:
    """Sum of squares; each row in the dtype of ``rows``, over rows in float64."""
    return float(torch.linalg.vector_norm(rows, dim=-1).double().square().sum())


def own_factors(delta: LowRank, kind: Kind, index: int) -> tuple[Tensor, Tensor]:
    """(L, M) with scaling * L @ M the delta of matrix ``index`` in the weight's own layout: (R, r) and (r, C)."""
    A, B = (delta.A[index], delta.B[index]) if delta.A.ndim == 3 else (delta.A, delta.B)
    return (A.mT, B.mT) if kind.turned else (B, A)


def _difference(changes: Sequence[Change], part: Part, out: Tensor) -> Tensor:
    """The weighted sum of differences, in ``out``: one product of all factors side by side."""
    left, right = [], []
    for change in changes:
        if change.delta is not None:
            L, M = own_factors(change.delta, part.parameter.kind, part.index)
            rows = L[part.start : part.stop].to(out.device, out.dtype)
            left.append(rows * (change.weight * change.delta.scaling))
            right.append(M.to(out.device, out.dtype))
    if left:
        torch.mm(torch.cat(left, 1), torch.cat(right, 0), out=out)
    else:
        out.zero_()
    for change in changes:
        for more in _in_full(change, part):
            out.add_(more.to(out.device, out.dtype), alpha=change.weight)
    return out


def _in_full(change: Change, part: Part) -> list[Tensor]:
    """The dense differences of ``change`` on the rows of ``part``."""
    found = []
    if change.added is not None:
        found.append(_rows_of(change.added, part))
    made = change.made() if change.made is not None else None
    if made is not None:
        matrix = made.dense() if isinstance(made, LowRank) else made
        own = matrix.mT if part.parameter.kind.turned else matrix
        found.append(own.reshape(own_shape(part.parameter))[part.start : part.stop])
    return found


def _applied(base: Tensor, part: Part, change: Change) -> Tensor:
    """What ``change``, without its weight, makes of the rows ``base``."""
    rows = base if change.saved is None else _rows_of(change.saved, part).to(base.device, base.dtype)
    if change.delta is not None and change.magnitude is not None:
        rows = rows + _rescaled(rows, part, change.delta, change.magnitude)
        delta = None
    else:
        delta = change.delta
    rest = Change(1.0, delta=delta, added=change.added, made=change.made)
    rows = rows + _difference([rest], part, torch.empty_like(base))
    if change.rows is not None:
        indices, new = change.rows
        here = [(i - part.start, n) for n, i in enumerate(indices) if part.start <= i < part.stop]
        if here:
            places, numbers = (torch.tensor(column) for column in zip(*here, strict=True))
            rows = rows.index_copy(0, places.to(rows.device), new[numbers].to(rows.device, rows.dtype))
    return rows


def _rescaled(rows: Tensor, part: Part, delta: LowRank, magnitude: Tensor) -> Tensor:
    """DoRA's difference on ``rows``; of a linear layer each row stands for itself."""
    turned = part.parameter.kind.turned
    if not turned and not (magnitude.ndim == 2 and magnitude.shape[0] == 1):
        delta = LowRank(delta.A, delta.B[part.start : part.stop], delta.scaling)
        magnitude = magnitude.flatten()[part.start : part.stop]
    moved = LowRank(delta.A.to(rows.device), delta.B.to(rows.device), delta.scaling)
    matrix = rescaled(as_matrix(rows, part.parameter.kind), moved, wide(magnitude.to(rows.device)))
    dense = matrix.dense() if isinstance(matrix, LowRank) else matrix
    return dense.mT if turned else dense


def _rows_of(tensor: Tensor, part: Part) -> Tensor:
    """The rows of ``part`` in a tensor of the parameter's shape."""
    return tensor.reshape(-1, *own_shape(part.parameter))[part.index, part.start : part.stop]
