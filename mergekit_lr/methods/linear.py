"""Weighted averages of models (model soups, arXiv 2203.05482): cost O(T m n), one model in memory at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_lr.methods.delta import Delta, combine
from mergekit_lr.methods.registry import PerModel, method


@method("linear", paper="2203.05482", takes="weights", factored=True, elementwise=True)
def linear(models: Sequence[Delta], /, *, weights: PerModel = 1.0, normalize: bool = True) -> Delta:
    """The weighted average of the models.

    Formula:
        merged = sum_t w_t W_t / sum_t w_t

    Args:
        models: T tensors (..., m, n), or T ``LowRank``, of which the average has the sum of the ranks.
        weights: one number for each model.
        normalize: divide by the sum of the weights, unless that is 0.

    Use when:
        Models of one base were trained on the same task with other seeds or settings (a model soup), or as the
        plain reference that any other merge has to beat.

    Not when:
        The models learnt different tasks: every delta shrinks by its share. task_arithmetic keeps their size.

    Cost:
        O(T m n), one model in memory at a time. Adapters stay factors; their ranks add up.

    Example:
        {weight: 0.5}
    """
    return combine(normalized(weights) if normalize else weights, models)


def normalized(weights: list[Any]) -> list[Any]:
    """The weights divided by their sum; where that is less than 1e-8 they stay as they are."""
    total = sum(weights[1:], start=weights[0])
    if isinstance(total, Tensor):
        total = total.where(total.abs() >= 1e-8, 1.0)
    elif abs(total) < 1e-8:
        return weights
    return [weight / total for weight in weights]
