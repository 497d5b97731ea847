"""Task arithmetic (arXiv 2212.04089): the weighted sum of task vectors. Cost O(T m n), one delta at a time."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.methods.delta import Delta, combine, scaled
from mergekit_lr.methods.linear import normalized
from mergekit_lr.methods.registry import Number, PerModel, method


@method("task_arithmetic", paper="2212.04089", takes="deltas", spaces=("full", "core", "knots"), factored=True)
def task_arithmetic(
    deltas: Sequence[Delta], /, *, weights: PerModel = 1.0, normalize: bool = False, scale: Number = 1.0
) -> Delta:
    """The weighted sum of the deltas.

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``, of which the sum has the sum of the ranks.
        weights: one number per model.
        normalize: divide by the sum of the weights, unless that is 0.
        scale: multiplies the result.
    """
    return scaled(combine(normalized(weights) if normalize else weights, deltas), scale)
