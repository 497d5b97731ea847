"""Spherical interpolation of two models along the great circle between them.

On the whole tensor as one vector: (sin((1 - t) a) x + sin(t a) y) / sin(a), a the angle between x and y. The result
is a linear combination, and its coefficients follow from three inner products, so factors stay factors.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.methods.blocks import Blocks, products
from mergekit_lr.methods.delta import Delta, combine, gram
from mergekit_lr.methods.registry import Number, method

_COLLINEAR = 0.9995  # |cosine| above which the arc is taken for its chord


def coefficients(blocks: Blocks, *, t: Number, **_: Any) -> list[float]:
    """What the two models are multiplied by, with all of the matrix seen."""
    return [float(c) for c in arc(products(blocks), t, 1 - _COLLINEAR)]


@method(
    "slerp",
    paper="10.1145/325334.325242",
    takes="weights",
    factored=True,
    elementwise=True,
    measure=coefficients,
    models=(2, 2),
)
def slerp(models: Sequence[Delta], /, *, t: Number, measured: list[float] | None = None) -> Delta:
    """Spherical interpolation from the first model (t = 0) to the second (t = 1).

    The vectors keep their lengths: for unequal ones the result's length is between, though not linear in t.

    Formula:
        merged = (sin((1 - t) a) W_1 + sin(t a) W_2) / sin(a)
        cos(a) = <W_1, W_2> / (||W_1|| ||W_2||)

    Args:
        models: two tensors (..., m, n), or two ``LowRank``.
        t: where on the arc. Nearly parallel or opposite vectors are interpolated linearly.

    Use when:
        Two models are blended and the length of the weights should not sink as in an average. A gradient of t
        over the layers gives each end of the network to one of them.

    Not when:
        There are more than two models (multislerp, karcher), or the two are nearly parallel, as fine-tunes of
        one base mostly are: there slerp is a plain average.

    Cost:
        O(m n): three inner products and one sum. Adapters stay factors.

    Example:
        {t: 0.5}
    """
    return combine(arc(gram(models), t, 1 - _COLLINEAR) if measured is None else measured, models)


def arc(products: Tensor, t: Number, flat: float) -> tuple[Tensor, Tensor]:
    """The two coefficients (..., 1, 1) at ``t`` from the inner products (..., 2, 2).

    Linear where 1 - |cosine| < ``flat``; a zero vector is at a right angle to everything.
    """
    lengths = products.diagonal(dim1=-2, dim2=-1).sqrt()
    size = lengths.prod(-1)
    cosine = (products[..., 0, 1] / size.where(size > 0, 1.0)).clamp(-1, 1)[..., None, None]
    angle = cosine.acos()
    curved = 1 - cosine.abs() >= flat
    sine = angle.sin().where(curved, 1.0)
    t = torch.as_tensor(t, dtype=torch.float64, device=products.device)
    first = (((1 - t) * angle).sin() / sine).where(curved, 1 - t)
    second = ((t * angle).sin() / sine).where(curved, t)
    return first, second
