"""Spherical interpolation of two models with a weight each, whole or row by row (mergekit's nuslerp)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.blocks import Blocks, products
from mergekit_lr.methods.delta import Delta, combine, gram, widened
from mergekit_lr.methods.registry import PerModel, method
from mergekit_lr.methods.slerp import arc

_COLLINEAR = 1e-16  # 1 - |cosine| below which the arc is taken for its chord


def coefficients(blocks: Blocks, *, weights: list[Any], **_: Any) -> list[float]:
    """What the two models, or their deltas, are multiplied by, with all of the matrix seen."""
    return [float(c) for c in arc(products(blocks), _share(weights), _COLLINEAR)]


@method(
    "nuslerp",
    paper="mergekit",
    takes="weights",
    factored=True,
    elementwise=lambda given: given.get("nuslerp_flatten", True),
    measure=coefficients,
    models=(2, 2),
)
def nuslerp(
    models: Sequence[Delta],
    /,
    *,
    base: Tensor | None = None,
    weights: PerModel = 1.0,
    nuslerp_flatten: bool = True,
    nuslerp_row_wise: bool = False,
    measured: list[float] | None = None,
) -> Delta:
    """Spherical interpolation of two models at w_2 / (w_1 + w_2), of their deltas if there is a base.

    Formula:
        t = w_2 / (w_1 + w_2)
        merged = (sin((1 - t) a) W_1 + sin(t a) W_2) / sin(a)

    Args:
        models: two tensors (..., m, n), or two ``LowRank``.
        base: what the deltas are relative to.
        weights: two numbers; a sum of 0 means the middle.
        nuslerp_flatten: the whole tensor is one vector; otherwise each row is.
        nuslerp_row_wise: with ``nuslerp_flatten`` off: each column is. (The name is mergekit's.)

    Use when:
        As slerp, with a weight for each model; with a base_model the deltas are interpolated, where angles are
        large enough to matter.

    Not when:
        More than two models are merged: multislerp or karcher.

    Cost:
        O(m n): three inner products and one sum. By rows as much again.

    Example:
        {weight: 0.5}
    """
    deltas = models if base is None else [widened(_dense(model)) - base for model in models]
    t = _share(weights)
    if nuslerp_flatten:
        merged = combine(arc(gram(deltas), t, _COLLINEAR) if measured is None else measured, deltas)
    else:
        left, right = (widened(_dense(delta)) for delta in deltas)
        columns = nuslerp_row_wise and left.shape[-2] > 1
        merged = _by_rows(left.mT, right.mT, t).mT if columns else _by_rows(left, right, t)
    return merged if base is None or not isinstance(merged, Tensor) else base + merged


def _share(weights: list[Any]) -> Any:
    """w_2 / (w_1 + w_2), 1/2 where the sum is 0."""
    total = weights[0] + weights[1]
    if isinstance(total, Tensor):
        return (weights[1] / total.where(total.abs() >= 1e-6, 1.0)).where(total.abs() >= 1e-6, 0.5)
    return weights[1] / total if abs(total) >= 1e-6 else 0.5


def _by_rows(left: Tensor, right: Tensor, t: Any) -> Tensor:
    """The same for each row of (..., m, n)."""
    rows = torch.stack([left, right], -2)
    products = rows.double() @ rows.double().mT  # (..., m, 2, 2)
    if isinstance(t, Tensor):
        t = t[..., None, :]
    first, second = (c[..., 0].to(left.dtype) for c in arc(products, t, _COLLINEAR))
    return first * left + second * right


def _dense(model: Delta) -> Tensor:
    if not isinstance(model, Tensor):
        raise UsageError("nuslerp with a base or by rows works on dense tensors: merge in the space 'full'")
    return model
