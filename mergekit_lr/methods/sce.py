"""SCE (arXiv 2408.07990): select the elements that vary most between models, weigh models by energy, elect signs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from lrgpu.selection import largest
from torch import Tensor

from mergekit_lr.methods.consensus import elected_sum
from mergekit_lr.methods.dare import Compat
from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, method


@method("sce", paper="2408.07990", takes="deltas", spaces=("full", "core", "knots"))
def sce(
    deltas: Sequence[Tensor],
    /,
    *,
    select_topk: Number = 1.0,
    scale: Number = 1.0,
    compat: Compat = "paper",
) -> Tensor:
    """Keeps the elements that vary most between models and averages those of the elected sign by energy.

    Formula:
        tau_t = delta_t where the variance over t is among the select_topk largest
        w_t = ||tau_t||^2 / sum_s ||tau_s||^2
        s = sgn(sum_t tau_t)
        merged = scale sum_(sgn(tau_t) = s) w_t tau_t / sum_(sgn(tau_t) = s) w_t

    Args:
        deltas: T tensors (..., m, n); read three times.
        select_topk: the share of the elements with any variance that is kept, those that vary most.
        scale: multiplies the result.
        compat: "mergekit" weighs all models alike where their energies sum to less than 1e-6.

    Use when:
        Models of one architecture were taught by different teachers and no weights are known: they follow from
        the energies, tensor by tensor.

    Not when:
        One of two models is much stronger in norm: it outweighs the other.

    Cost:
        O(T m n), with three reads of every delta and one selection.

    Example:
        {select_topk: 0.5}
    """
    mask = _varying(deltas, select_topk)
    energies = [(widened(delta) * mask).double().square().mean((-2, -1), keepdim=True) for delta in deltas]
    total = torch.stack(energies).sum(0)
    enough = total >= 1e-6 if compat == "mergekit" else total > 0
    shares = [e / total.where(enough, 1.0) for e in energies]
    weights: list[Any] = [torch.where(enough, share, 1 / len(deltas)) for share in shares]
    selected = (widened(delta) * mask for delta in deltas)
    return elected_sum(selected, weights, elect_on="unweighted") * scale


def _varying(deltas: Sequence[Tensor], share: Any) -> Tensor | float:
    """Which elements (..., m, n) are kept: the floor(share n) of largest variance, n counting those with any."""
    if not isinstance(share, Tensor) and share >= 1:
        return 1.0
    mean = sum((widened(delta) for delta in deltas[1:]), start=widened(deltas[0])) / len(deltas)
    variance = sum(((widened(delta) - mean).square() for delta in deltas[1:]), start=(deltas[0] - mean).square())
    flat = variance.reshape(-1, variance.shape[-2] * variance.shape[-1])
    shares = torch.as_tensor(share).expand(*variance.shape[:-2], 1, 1).flatten().tolist()
    take = [n if s >= 1 else int(n * s) for n, s in zip(torch.count_nonzero(flat, -1).tolist(), shares, strict=True)]
    return largest(flat, take).reshape(variance.shape)
