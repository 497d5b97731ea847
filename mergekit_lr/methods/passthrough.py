"""One model's tensor as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.methods.delta import Delta, scaled
from mergekit_lr.methods.registry import PerModel, method


@method("passthrough", paper="mergekit", takes="weights", factored=True, models=(1, 1))
def passthrough(models: Sequence[Delta], /, *, scale: PerModel = 1.0) -> Delta:
    """A copy of the only model, times ``scale``.

    Formula:
        merged = scale W_1

    Args:
        models: one tensor (..., m, n), or one ``LowRank``.
        scale: multiplies the tensor.

    Use when:
        Layers of models are stacked on each other (slices), or a model is copied with some tensors scaled.

    Not when:
        Tensors are to be mixed: it takes one model at each place.

    Cost:
        O(m n), a copy. An adapter stays factors.

    Example:
        {scale: 0.5}
    """
    return scaled(models[0], scale[0])
