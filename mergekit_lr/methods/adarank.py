"""AdaRank (arXiv 2503.22178): each singular component of each task is kept or dropped, by a learned mask.

The merge for given masks, and the initial masks; learning them takes forward passes and is not done here. With
centred deltas (the CART variant) the origin is the mean of the fine-tunes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.methods.delta import Delta, combine, from_triplets, triplets
from mergekit_lr.methods.registry import PerModel, method

_START = 0.1  # logit of a component that is kept at first; its opposite for one that is not


def whole(deltas: Sequence[Delta], /, *, weights: PerModel, centered: bool = False, **_: Any) -> Delta:
    """Unmasked: the weighted sum of the deltas, or of their differences from the mean plus the mean."""
    if not centered:
        return combine(weights, deltas)
    average = combine([1 / len(deltas)] * len(deltas), deltas)
    return combine([1 - sum(weights), *weights], [average, *deltas])


@method(
    "adarank",
    paper="2503.22178",
    takes="deltas",
    spaces=("full", "core"),
    vectors=whole,
    factored=True,
    basis="any",
    spectral=True,
)
def adarank(
    deltas: Sequence[Delta],
    /,
    *,
    weights: PerModel = 0.3,
    masks: Tensor | None = None,
    ratio: float = 1.0,
    centered: bool = False,
) -> Delta:
    """The sum of the deltas' singular components that the masks keep. Vectors are kept whole.

    Formula:
        delta_t = sum_i S_(t,i) u_(t,i) v_(t,i)^T
        merged = sum_t w_t sum_(mask_(t,i) > 0) S_(t,i) u_(t,i) v_(t,i)^T

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``.
        weights: one coefficient for each model. The paper starts from 0.3 for eight tasks, or 2.3 with ``centered``.
        masks: logits (..., T, p), p = min(m, n), or the rank for factors: a component is kept if its logit is positive.
        ratio: without masks, the share of the leading components that is kept; 0 means 1 / T.
        centered: decompose the deltas' differences from their mean and add that: the CART variant.

    Use when:
        Masks of the components are given, or each task is cut to its leading share before a sum.

    Not when:
        Masks should be learnt: that takes forward passes, which a merge does not make.

    Cost:
        A full SVD of every delta. Factors stay factors.

    Example:
        {weight: 0.3, ratio: 0.16}

    Raises:
        MismatchError: the masks do not have one logit for each component.
    """
    average = combine([1 / len(deltas)] * len(deltas), deltas) if centered else None
    merged = [] if average is None else [average]
    for t, (delta, weight) in enumerate(zip(deltas, weights, strict=True)):
        parts = triplets(delta if average is None else combine([1, -1], [delta, average]))
        size = parts.S.shape[-1]
        logits = initial_masks(size, len(deltas), ratio).to(parts.S.device)[t] if masks is None else masks[..., t, :]
        if logits.shape[-1] != size:
            raise MismatchError(f"adarank: masks have {logits.shape[-1]} logits for {size} singular components")
        kept = parts.S * (logits > 0)
        merged.append(combine([weight], [from_triplets(parts.U, kept, parts.Vh, delta)]))
    return combine([1] * len(merged), merged)


def initial_masks(size: int, tasks: int, ratio: float) -> Tensor:
    """The logits (T, p) that training starts from: the floor(ratio p) leading components are kept.

    Args:
        size: p, singular components of a task.
        tasks: T.
        ratio: the share that is kept at first; 0 means 1 / T.

    Raises:
        UsageError: ``ratio`` is not between 0 and 1.
    """
    if not 0 <= ratio <= 1:
        raise UsageError(f"adarank: 'ratio' must be from 0 to 1, got {ratio:g}")
    kept = int(size * (ratio or 1 / tasks))
    return torch.where(torch.arange(size) < kept, _START, -_START).repeat(tasks, 1)
