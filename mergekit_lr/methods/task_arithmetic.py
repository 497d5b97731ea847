"""Task arithmetic (arXiv 2212.04089): the weighted sum of task vectors. Cost O(T m n), one delta at a time."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.methods.delta import Delta, combine, scaled
from mergekit_lr.methods.linear import normalized
from mergekit_lr.methods.registry import Number, PerModel, method


@method(
    "task_arithmetic",
    paper="2212.04089",
    takes="deltas",
    spaces=("full", "core", "knots"),
    factored=True,
    elementwise=True,
    basis="none",
)
def task_arithmetic(
    deltas: Sequence[Delta], /, *, weights: PerModel = 1.0, normalize: bool = False, scale: Number = 1.0
) -> Delta:
    """The weighted sum of the deltas.

    Formula:
        merged = scale sum_t w_t delta_t

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``, of which the sum has the sum of the ranks.
        weights: one number for each model.
        normalize: divide by the sum of the weights, unless that is 0.
        scale: multiplies the result.

    Use when:
        The first thing to try with fine-tunes of one base. A negative weight takes a task out.

    Not when:
        Many tasks are added at weight 1: the sum grows. Tune scale, or use a method that resolves conflicts.

    Cost:
        O(T m n), one delta in memory at a time. Adapters stay factors; their ranks add up.

    Example:
        {weight: 0.5}
    """
    return scaled(combine(normalized(weights) if normalize else weights, deltas), scale)
