"""Nearswap: where a model is close to the base it is taken over, where it is far it moves the base little."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, method


@method("nearswap", paper="mergekit", takes="weights", elementwise=True, models=(1, 1))
def nearswap(models: Sequence[Tensor], /, *, base: Tensor, t: Number) -> Tensor:
    """The base moved towards the model by at most ``t`` in every element.

    Formula:
        merged = W_0 + c (W_1 - W_0)
        c = min(1, t / |W_1 - W_0|)

    Args:
        models: one tensor (..., m, n).
        base: (..., m, n).
        t: the largest move.

    Use when:
        A second model should colour the base lightly: what is near is taken over whole, what is far moves by t
        at most.

    Not when:
        Large changes are what the second model is good for.

    Cost:
        O(m n).

    Example:
        {t: 0.0001}
    """
    delta = widened(models[0]) - base
    share = (t / delta.abs()).nan_to_num(nan=0.0, posinf=1.0).clamp(0, 1)
    return base + (share * delta).to(torch.promote_types(delta.dtype, base.dtype))
