"""Model breadcrumbs (arXiv 2312.06795): drop both the largest and the smallest elements of each delta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import torch
from lrgpu.selection import Cut, cut
from torch import Tensor

from mergekit_lr.methods.blocks import Blocks, sampled_cuts
from mergekit_lr.methods.consensus import elected_sum, weighted_sum
from mergekit_lr.methods.dare import Compat
from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, PerModel, Share, method
from mergekit_lr.methods.ties import beyond, matched_l1


class Ring(NamedTuple):
    """What is kept of a matrix: what is beyond ``least``, but not beyond ``most``."""

    least: Cut
    most: Cut


def rings(blocks: Blocks, *, density: list[Any], gamma: list[Any], compat: Compat = "paper", **_: Any) -> list[Ring]:
    """For each model what is kept of the whole matrix."""
    counts = [_counts(blocks.size, *shares, compat) for shares in zip(density, gamma, strict=True)]
    least = sampled_cuts(blocks, [keep + top for keep, top in counts])
    most = sampled_cuts(blocks, [top for _, top in counts])
    return [Ring(*cuts) for cuts in zip(least, most, strict=True)]


@method(
    "breadcrumbs",
    paper="2312.06795",
    takes="deltas",
    spaces=("full", "core", "knots"),
    elementwise=lambda given: not given.get("rescale", False),
    measure=rings,
)
def breadcrumbs(
    deltas: Sequence[Tensor],
    /,
    *,
    weights: PerModel = 1.0,
    density: Share = 1.0,
    gamma: Share = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    scale: Number = 1.0,
    compat: Compat = "paper",
    measured: list[Ring] | None = None,
    start: int = 0,
) -> Tensor:
    """Drops outliers and small elements of each delta, and takes the weighted sum.

    Formula:
        tau_t = delta_t without its gamma m n largest elements, the next density m n kept
        merged = scale sum_t w_t tau_t

    Args:
        deltas: T tensors (..., m, n).
        weights: one number for each model.
        density: the share of elements that is kept, floor(density n) of them.
        gamma: the share of the largest that is dropped; fewer where ``density`` does not allow so many.
        normalize: divide by the sum of the weights, unless that is 0.
        rescale: restore the L1 norm of the delta.
        scale: multiplies the result.
        compat: "mergekit" drops a whole tensor of which gamma is less than one element.

    Use when:
        Many tasks are added and a few outliers of each would dominate; no seed is involved.

    Not when:
        The largest changes carry the task, as in small adapters: they are what is dropped.

    Cost:
        O(T m n); two selections for each delta, one delta in memory at a time.

    Example:
        {density: 0.9, gamma: 0.01}
    """
    crumbs = _crumbs(deltas, density, gamma, rescale, compat, measured, start)
    return weighted_sum(crumbs, weights, normalize=normalize) * scale


@method(
    "breadcrumbs_ties",
    paper="2312.06795",
    takes="deltas",
    spaces=("full", "core", "knots"),
    elementwise=lambda given: not given.get("rescale", False),
    measure=rings,
)
def breadcrumbs_ties(
    deltas: Sequence[Tensor],
    /,
    *,
    weights: PerModel = 1.0,
    density: Share = 1.0,
    gamma: Share = 0.01,
    normalize: bool = False,
    rescale: bool = False,
    scale: Number = 1.0,
    compat: Compat = "paper",
    measured: list[Ring] | None = None,
    start: int = 0,
) -> Tensor:
    """Drops outliers and small elements of each delta, and sums those of the elected sign.

    Formula:
        tau_t = delta_t without its gamma m n largest elements, the next density m n kept
        s = sgn(sum_t w_t tau_t)
        merged = scale sum_(sgn(tau_t) = s) w_t tau_t

    Args:
        deltas, weights, density, gamma, rescale, scale, compat: as for ``breadcrumbs``.
        normalize: divide by the sum of the weights of what agrees.

    Use when:
        As breadcrumbs, where tasks also disagree in sign.

    Not when:
        As breadcrumbs. The sum is not averaged by default: weights that sum to 1 keep its size.

    Cost:
        O(T m n); two selections for each delta. Large matrices are merged block by block.

    Example:
        {density: 0.9, gamma: 0.01, weight: 0.5}
    """
    crumbs = _crumbs(deltas, density, gamma, rescale, compat, measured, start)
    return elected_sum(crumbs, weights, divisor="weights" if normalize else "none") * scale


def _crumbs(
    deltas: Iterable[Tensor],
    density: list[Any],
    gamma: list[Any],
    rescale: bool,
    compat: Compat,
    measured: list[Ring] | None,
    start: int,
) -> Iterator[Tensor]:
    for t, delta in enumerate(deltas):
        delta = widened(delta)
        if measured is not None:
            yield _within(delta, measured[t], start)
            continue
        rows = delta.reshape(-1, delta.shape[-2] * delta.shape[-1])
        shares = (_spread(share, delta) for share in (density[t], gamma[t]))
        kept = []
        for row, share, drop in zip(rows, *shares, strict=True):
            keep, top = _counts(row.numel(), share, drop, compat)
            magnitudes = row.abs()
            ring = Ring(cut([magnitudes], keep + top, row.numel()), cut([magnitudes], top, row.numel()))
            kept.append(_within(row, ring))
        crumbs = torch.stack(kept).reshape(delta.shape)
        yield matched_l1(crumbs, delta) if rescale else crumbs


def _spread(share: Any, delta: Tensor) -> list[float]:
    """The share of each matrix of the batch."""
    return torch.as_tensor(share, dtype=torch.float64).expand(*delta.shape[:-2], 1, 1).flatten().tolist()


def _within(values: Tensor, ring: Ring, start: int = 0) -> Tensor:
    return beyond(values, ring.least, start) - beyond(values, ring.most, start)


def _counts(size: int, density: float, gamma: float, compat: Compat) -> tuple[int, int]:
    """How many elements of ``size`` are kept, and how many larger ones are dropped."""
    keep, drop = int(density * size), int(gamma * size)
    if compat == "mergekit" and not drop and keep != size:
        return 0, 0
    return keep, min(drop, size - keep)
