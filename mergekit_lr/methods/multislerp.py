"""A barycentre of several models on the sphere (mergekit's multislerp).

The published rule maps the unit vectors into the tangent space at their weighted mean, averages there and maps back.
That average is zero, since the mean's own direction is all that the weighted sum of the unit vectors has. What is
left is the weighted mean direction times the weighted mean length, which is computed here: a linear combination
whose coefficients follow from the inner products, so factors stay factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.blocks import products
from mergekit_lr.methods.delta import Delta, combine, gram, widened
from mergekit_lr.methods.linear import normalized
from mergekit_lr.methods.registry import PerModel, method


@method("multislerp", paper="mergekit", takes="weights", factored=True, elementwise=True, measure=products)
def multislerp(
    models: Sequence[Delta],
    /,
    *,
    base: Tensor | None = None,
    weights: PerModel = 1.0,
    normalize_weights: bool = True,
    eps: float = 1e-8,
    measured: Tensor | None = None,
) -> Delta:
    """The weighted mean direction of several models, or of their deltas, at their weighted mean length.

    Formula:
        u = sum_t w_t W_t / ||W_t||
        merged = u / ||u|| * sum_t w_t ||W_t||

    Args:
        models: T tensors (..., m, n), or T ``LowRank``. One model is returned as it is.
        base: what the deltas are relative to.
        weights: one number for each model.
        normalize_weights: divide the weights by their sum.
        eps: added to each length before dividing by it; a mean shorter than this has no direction.

    Use when:
        Several models are blended with weights and the lengths should be kept; with a base_model their deltas
        are.

    Not when:
        The exact mean on the sphere is wanted (karcher), or the weighted directions cancel, which is an error.

    Cost:
        O(T^2 m n) for the inner products, O(T m n) for the sum. Adapters stay factors.

    Example:
        {weight: 0.5}

    Raises:
        UsageError: the weighted unit vectors cancel, for more than two models. For two the weighted sum is taken.
    """
    if len(models) == 1:
        return models[0]
    dense = [model for model in models if isinstance(model, Tensor)]
    deltas = models if base is None else [widened(model) - base for model in dense]
    inner = gram(deltas) if measured is None else measured
    lengths = inner.diagonal(dim1=-2, dim2=-1).sqrt()  # (..., T)
    w = torch.stack([_over(weight, lengths) for weight in (normalized(weights) if normalize_weights else weights)], -1)
    c = w / (lengths + eps)
    mean = (c * (inner @ c[..., None])[..., 0]).sum(-1).clamp_min(0).sqrt()
    none = mean < eps
    cancel = none & (lengths > eps).any(-1)  # and not a tensor that no model changed, whose mean is zero as well
    if bool(cancel.any()) and len(models) > 2:
        raise UsageError("multislerp: the weighted models cancel, so their mean has no direction; change the weights")
    along = c / mean.where(~none, 1.0)[..., None] * (w * lengths).sum(-1, keepdim=True)
    coefficients = torch.where(none[..., None], w, along)
    merged = combine([coefficient[..., None, None] for coefficient in coefficients.unbind(-1)], deltas)
    return merged if base is None or not isinstance(merged, Tensor) else base + merged


def _over(weight: object, lengths: Tensor) -> Tensor:
    """A weight, a number or (..., 1, 1), as float64 over the batch of (..., T)."""
    value = torch.as_tensor(weight, dtype=torch.float64, device=lengths.device)
    return (value[..., 0, 0] if value.ndim else value).expand(lengths.shape[:-1])
