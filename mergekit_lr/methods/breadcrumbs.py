"""Model breadcrumbs (arXiv 2312.06795): drop both the largest and the smallest elements of each delta."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from lrgpu.selection import largest
from torch import Tensor

from mergekit_lr.methods.consensus import elected_sum, weighted_sum
from mergekit_lr.methods.dare import Compat
from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, PerModel, Share, method
from mergekit_lr.methods.ties import counts, matched_l1


@method("breadcrumbs", paper="2312.06795", takes="deltas", spaces=("full", "core", "knots"))
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
    crumbs = _crumbs(deltas, density, gamma, rescale, compat)
    return weighted_sum(crumbs, weights, normalize=normalize) * scale


@method("breadcrumbs_ties", paper="2312.06795", takes="deltas", spaces=("full", "core", "knots"))
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
        O(T m n); two selections for each delta, one delta in memory at a time.

    Example:
        {density: 0.9, gamma: 0.01, weight: 0.5}
    """
    crumbs = _crumbs(deltas, density, gamma, rescale, compat)
    return elected_sum(crumbs, weights, divisor="weights" if normalize else "none") * scale


def _crumbs(
    deltas: Iterable[Tensor], density: list[Any], gamma: list[Any], rescale: bool, compat: Compat
) -> Iterator[Tensor]:
    for t, delta in enumerate(deltas):
        delta = widened(delta)
        size = delta.shape[-2] * delta.shape[-1]
        keep = counts(density[t], delta)
        top = [min(drop, size - kept) for drop, kept in zip(counts(gamma[t], delta), keep, strict=True)]
        if compat == "mergekit":
            keep = [k if drop or k == size else 0 for k, drop in zip(keep, counts(gamma[t], delta), strict=True)]
        magnitudes = delta.abs().reshape(-1, size)
        kept = largest(magnitudes, [k + d for k, d in zip(keep, top, strict=True)]) & ~largest(magnitudes, top)
        crumbs = delta * kept.reshape(delta.shape)
        yield matched_l1(crumbs, delta) if rescale else crumbs
