"""TIES (arXiv 2306.01708): trim each delta to its largest elements, elect a sign, average what agrees.

The threshold is found by selection, in one read with a sample. Cost O(T m n); large matrices go block by block.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from math import inf
from typing import Any, Literal

import numpy
import torch
from lrgpu.selection import Cut, cut, kth_smallest
from torch import Tensor

from mergekit_lr.methods.blocks import Blocks, sampled_cuts
from mergekit_lr.methods.consensus import elected_sum
from mergekit_lr.methods.delta import scaled, widened
from mergekit_lr.methods.registry import Number, PerModel, Share, method


def cuts(blocks: Blocks, *, density: list[Any], threshold: list[Any] | None, **_: Any) -> list[Cut]:
    """For each model what :func:`keep_largest` keeps of the whole matrix."""
    if threshold is not None:
        return [Cut(limit, inf) for limit in threshold]
    return sampled_cuts(blocks, [int(share * blocks.size) for share in density])


@method(
    "ties",
    paper="2306.01708",
    takes="deltas",
    spaces=("full", "core", "knots"),
    elementwise=lambda given: not given.get("rescale", False) and given.get("zero_sign") != "majority",
    measure=cuts,
)
def ties(
    deltas: Sequence[Tensor],
    /,
    *,
    weights: PerModel = 1.0,
    density: Share = 1.0,
    threshold: PerModel = None,
    normalize: bool = True,
    rescale: bool = False,
    scale: Number = 1.0,
    elect_on: Literal["weighted", "unweighted"] = "weighted",
    majority: Literal["sum", "count"] = "sum",
    zero_sign: Literal["positive", "majority"] = "positive",
    divide_by: Literal["weights", "count"] = "weights",
    measured: list[Cut] | None = None,
    start: int = 0,
) -> Tensor:
    """Trims each delta, elects a sign per element, and averages the values of that sign.

    Formula:
        tau_t = the density m n largest elements of delta_t
        s = sgn(sum_t w_t tau_t)
        merged = scale sum_(sgn(tau_t) = s) w_t tau_t / sum_(sgn(tau_t) = s) w_t

    Args:
        deltas: T tensors (..., m, n).
        weights: one number for each model.
        density: the share of a tensor's elements that is kept, floor(density n) of them, the largest.
        threshold: keep every element of at least this magnitude instead. With :func:`trim_threshold` that trims
            over a whole model, as the paper does, where ``density`` trims each tensor.
        normalize: average; otherwise sum.
        rescale: restore the L1 norm that trimming took.
        scale: multiplies the result.
        elect_on: on the deltas times their weights, or on the deltas alone (paper, PEFT).
        majority: the sign of the sum, or the sign that most have.
        zero_sign: the sign that a sum of exactly 0 elects: +, or what prevails in the tensor.
        divide_by: average over the weights of what agrees, or over its count (paper, PEFT).

    Use when:
        Three or more fine-tunes disagree in sign (lrmerge compare shows the share): opposite changes are not
        averaged away.

    Not when:
        Two similar models are merged: averaging only what agrees makes the result larger than their average.

    Cost:
        O(T m n); the threshold is found by selection. Large matrices are merged block by block.

    Example:
        {density: 0.5}
    """
    if measured is not None:
        trimmed = (beyond(widened(delta), where, start) for delta, where in zip(deltas, measured, strict=True))
    else:
        trimmed = _trimmed(deltas, density, threshold, rescale)
    merged = elected_sum(
        trimmed,
        weights,
        divisor=divide_by if normalize else "none",
        elect_on=elect_on,
        majority=majority,
        zero_sign=zero_sign,
    )
    return _tensor(scaled(merged, scale))


def trim_threshold(tensors: Sequence[Tensor], keep: int) -> float:
    """The magnitude from which on the ``keep`` largest elements of all the tensors together lie.

    Args:
        tensors: all the deltas of one model, of any shapes and one dtype.
        keep: how many elements to keep; 0 keeps none (equal magnitudes may keep more).
    """
    total = sum(tensor.numel() for tensor in tensors)
    if keep <= 0 or not total:
        return float("inf")
    return kth_smallest([widened(tensor).abs() for tensor in tensors], max(1, total - keep + 1))


def keep_largest(delta: Tensor, density: Any) -> Tensor:
    """The delta (..., m, n) with only its floor(density m n) largest elements; ``density`` a number or (..., 1, 1)."""
    if not isinstance(density, Tensor) and density >= 1:
        return delta
    flat = delta.reshape(-1, delta.shape[-2] * delta.shape[-1])
    rows = zip(flat, counts(density, delta), strict=True)
    return torch.stack([beyond(row, cut([row.abs()], count, row.numel())) for row, count in rows]).reshape(delta.shape)


def beyond(values: Tensor, where: Cut, start: int = 0) -> Tensor:
    """``values`` that are among the largest, the others zero; ``start``: the place of the first in what was cut."""
    threshold, end = where
    if threshold < 0:
        return values
    if threshold == inf:
        return torch.zeros_like(values)
    inside = min(max(end - start, 0), values.numel())
    if 0 < inside < values.numel():
        parts = values.reshape(-1)[: int(inside)], values.reshape(-1)[int(inside) :]
        kept = [beyond(part, Cut(threshold, at)) for part, at in zip(parts, (inf, 0), strict=True)]
        return torch.cat(kept).reshape(values.shape)
    # Hard shrinkage keeps what is beyond its limit: with the next smaller number, the threshold itself too.
    if inside:
        if threshold == 0:
            return values
        kind = numpy.float64 if values.dtype == torch.float64 else numpy.float32
        threshold = float(numpy.nextafter(kind(threshold), kind(0)))
    return torch.nn.functional.hardshrink(values, threshold)


def counts(share: Any, delta: Tensor) -> list[int]:
    """floor(share m n) for each matrix of the batch."""
    size = delta.shape[-2] * delta.shape[-1]
    if not isinstance(share, Tensor):
        return [int(share * size)] * (delta.numel() // max(1, size))
    return [int(s * size) for s in share.expand(*delta.shape[:-2], 1, 1).flatten().tolist()]


def l1_ratio(before: float, after: float) -> float:
    """What brings an L1 norm ``after`` back to ``before``; 1 where either is zero."""
    return before / after if before >= 1e-7 and after >= 1e-7 else 1.0


def matched_l1(sparse: Tensor, delta: Tensor) -> Tensor:
    """``sparse`` scaled to the L1 norm of ``delta``, matrix by matrix, where neither is zero."""
    before, after = (x.abs().sum((-2, -1), keepdim=True) for x in (delta, sparse))
    usable = (before >= 1e-7) & (after >= 1e-7)
    return sparse * (before / after.where(usable, 1)).where(usable, 1)


def _trimmed(
    deltas: Iterable[Tensor], density: list[Any], threshold: list[Any] | None, rescale: bool
) -> Iterator[Tensor]:
    for t, delta in enumerate(deltas):
        delta = widened(delta)
        kept = keep_largest(delta, density[t]) if threshold is None else delta * (delta.abs() >= threshold[t])
        yield matched_l1(kept, delta) if rescale else kept


def _tensor(delta: Any) -> Tensor:
    return delta
