"""Arcee Fusion: takes over from a model only the changes that matter most, by size and by effect on each row."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lrgpu.selection import kth_smallest
from torch import Tensor

from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import method

_SMOOTHING = 1e-8  # added to probabilities before their logarithm


@method("arcee_fusion", paper="mergekit", takes="weights", models=(1, 1))
def arcee_fusion(models: Sequence[Tensor], /, *, base: Tensor) -> Tensor:
    """The base with those elements of the model whose importance is an outlier.

    Importance is |delta| times the divergence KL(softmax(row of model) || softmax(row of base)); an element is
    taken from the median plus 1.5 interquartile ranges on. Quantiles are exact order statistics.

    Formula:
        I = |W_1 - W_0| KL(softmax(W_1) || softmax(W_0))
        merged = W_1 where I >= median(I) + 1.5 (q_75 - q_25), else W_0

    Args:
        models: one tensor (..., m, n).
        base: (..., m, n).

    Use when:
        One fine-tune goes into a base and only its clearest changes should be kept, without a threshold to
        tune.

    Not when:
        Most of what was learnt is in many small changes: they are dropped.

    Cost:
        O(m n), with three selections per tensor.

    Example:
        {}
    """
    model, base = widened(models[0]), widened(base)
    p, q = (torch.softmax(x, -1) + _SMOOTHING for x in (model, base))
    divergence = (p * (p / q).log()).sum(-1, keepdim=True)
    importance = (model - base).abs() * divergence.clamp_min(0)
    flat = importance.reshape(-1, importance.shape[-2] * importance.shape[-1])
    limits = importance.new_tensor([_limit(row) for row in flat]).reshape(*importance.shape[:-2], 1, 1)
    return torch.where(importance >= limits, model, base)


def _limit(numbers: Tensor) -> float:
    """Median + 1.5 (upper - lower quartile), each at the rank floor(q (n - 1)) counted from 0."""
    lower, median, upper = (kth_smallest([numbers], int(q * (numbers.numel() - 1)) + 1) for q in (0.25, 0.5, 0.75))
    return median + 1.5 * (upper - lower)
