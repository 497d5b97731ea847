"""RAM (arXiv 2601.13572): average what several models changed, keep whole what only one of them did."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, method


@method("ram", paper="2601.13572", takes="deltas", spaces=("full", "core", "knots"), elementwise=True)
def ram(deltas: Sequence[Tensor], /, *, epsilon: Number = 1e-5, scale: Number = 1.0) -> Tensor:
    """Averages elements that several models changed and keeps those that one did.

    Formula:
        c = count_t(|delta_t| > epsilon)
        merged = scale sum_(|delta_t| > epsilon) delta_t / max(c, 1)

    Args:
        deltas: T tensors (..., m, n); read twice.
        epsilon: an element counts as changed if its magnitude is above this.
        scale: multiplies the result.

    Use when:
        Models that were trained by reinforcement learning, whose changes are sparse: what only one of them
        changed keeps its size.

    Not when:
        Every element changed in every model: then it is the average.

    Cost:
        O(T m n), with two reads of every delta.

    Example:
        {epsilon: 1.0e-5}
    """
    changed = _changes(deltas, epsilon)
    total = torch.zeros_like(widened(deltas[0]))
    for delta in deltas:
        total += _changed(delta, epsilon)
    return total / changed.clamp_min(1).to(total.dtype) * scale


@method("ramplus_tl", paper="2601.13572", takes="deltas", spaces=("full", "core", "knots"))
def ramplus_tl(
    deltas: Sequence[Tensor],
    /,
    *,
    r: Number = 0.1,
    alpha: Number = 0.2,
    epsilon: Number = 1e-5,
    scale: Number = 1.0,
) -> Tensor:
    """As ``ram``, with what only one model changed strengthened the more the model overlaps with others.

    Unique elements of a model are multiplied by 1 + r min(rho, alpha), rho = its shared over its unique elements
    in the tensor.

    Formula:
        c = count_t(|delta_t| > epsilon)
        f_t = 1 + r min(rho_t, alpha) where c = 1, else 1
        merged = scale sum_(|delta_t| > epsilon) f_t delta_t / max(c, 1)

    Args:
        deltas: T tensors (..., m, n); read twice.
        r: how much unique elements are strengthened.
        alpha: the overlap from which on they are no more so.
        epsilon: an element counts as changed if its magnitude is above this.
        scale: multiplies the result.

    Use when:
        As ram, where the averaging of shared changes should be made up for by the unique ones.

    Not when:
        As ram.

    Cost:
        O(T m n), with two reads of every delta.

    Example:
        {r: 0.1, alpha: 0.2}
    """
    changed = _changes(deltas, epsilon)
    unique = changed == 1
    total = torch.zeros_like(widened(deltas[0]))
    for delta in deltas:
        kept = _changed(delta, epsilon)
        mine = (kept != 0).sum((-2, -1), keepdim=True)
        alone = ((kept != 0) & unique).sum((-2, -1), keepdim=True)
        rho = (mine - alone) / alone.clamp_min(1)
        rho = torch.where(alone > 0, rho, float("inf")).clamp_max(alpha)
        total += kept * torch.where(unique, 1 + r * rho, 1.0).to(kept.dtype)
    return total / changed.clamp_min(1).to(total.dtype) * scale


def _changed(delta: Tensor, epsilon: Number) -> Tensor:
    delta = widened(delta)
    return delta * (delta.abs() > epsilon)


def _changes(deltas: Sequence[Tensor], epsilon: Number) -> Tensor:
    """How many models changed each element."""
    return sum((_changed(delta, epsilon) != 0 for delta in deltas[1:]), start=(_changed(deltas[0], epsilon) != 0).int())
