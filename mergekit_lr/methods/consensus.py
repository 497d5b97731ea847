"""Sums of deltas, with a sign elected in every element.

The elected sign is that of the sum, and only elements of that sign are added up. Methods that work in blocks have the
few deltas of a block in the cache, where they are read twice: for the votes, and for the sum of those that agree.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lr.methods.linear import normalized

Divisor = Literal["none", "weights", "count"]


def weighted_sum(deltas: Iterable[Tensor], weights: list[Any], *, normalize: bool) -> Tensor:
    """sum_t w_t delta_t, over the sum of the weights with ``normalize`` (unless that is 0). One delta at a time."""
    total: Tensor | None = None
    for weight, delta in zip(normalized(weights) if normalize else weights, deltas, strict=True):
        term = delta * _like(weight, delta)
        total = term if total is None else total.add_(term)
    assert total is not None
    return total


def elected_sum(
    deltas: Iterable[Tensor],
    weights: list[Any],
    *,
    divisor: Divisor = "weights",
    elect_on: Literal["weighted", "unweighted"] = "weighted",
    majority: Literal["sum", "count"] = "sum",
    zero_sign: Literal["positive", "majority"] = "positive",
) -> Tensor:
    """sum_t w_t delta_t over those t whose element has the elected sign; zeros never have it.

    Args:
        deltas: T tensors (..., m, n), sparse or not; all are held.
        weights: T numbers or tensors (..., 1, 1).
        divisor: divide by nothing, by the sum of the weights of what was added, or by how many were.
        elect_on: elect on w_t delta_t, or on delta_t alone.
        majority: the sign of the sum, or the sign that most have.
        zero_sign: what an exact zero elects: +, or the sign that prevails among all the tensor's elections.
    """
    held = list(deltas)
    weights = [_like(weight, delta) for weight, delta in zip(weights, held, strict=True)]
    voices = weights if elect_on == "weighted" else [1.0] * len(weights)
    votes, scratch = torch.zeros_like(held[0]), torch.empty_like(held[0])
    for delta, voice in zip(held, voices, strict=True):
        # Rounded before it is added: opposite deltas of equal weight then cancel, where a fused sum leaves an error.
        vote = torch.mul(delta, voice, out=scratch)
        votes += vote.sign_() if majority == "count" else vote
    sign = _signs(votes, zero_sign)
    total, shares = torch.zeros_like(sign), torch.zeros_like(sign)
    for delta, voice, weight in zip(held, voices, weights, strict=True):
        agrees = _agree(torch.mul(delta, sign, out=scratch), voice)
        if isinstance(weight, Tensor):
            total.addcmul_(delta * weight, agrees)
        else:
            total.addcmul_(delta, agrees, value=weight)
        share = weight if divisor == "weights" else 1.0
        if isinstance(share, Tensor):
            shares.addcmul_(agrees, share)
        elif divisor != "none":
            shares.add_(agrees, alpha=share)
    return total if divisor == "none" else total.div_(shares.add_(torch.eq(shares, 0, out=scratch)))


def _signs(votes: Tensor, zero_sign: str) -> Tensor:
    """The elected signs, 1.0 and -1.0, in the memory of ``votes``."""
    undecided = votes == 0 if zero_sign == "majority" else None
    prevailing = votes.sign().sum((-2, -1), keepdim=True) >= 0 if undecided is not None else None
    signs = torch.ge(votes, 0, out=votes).mul_(2).sub_(1)
    return signs if undecided is None or prevailing is None else torch.where(undecided & ~prevailing, -1.0, signs)


def _agree(along: Tensor, voice: Any) -> Tensor:
    """Which deltas have the elected sign, with their ``voice``: ``along`` is the delta times that sign, overwritten.

    As 1.0 and 0.0: on a CPU, arithmetic with those is many times faster than with booleans.
    """
    if isinstance(voice, Tensor) or voice == 0:
        along *= voice
    elif voice < 0:
        return torch.lt(along, 0, out=along)
    return torch.gt(along, 0, out=along)


def _like(weight: Any, delta: Tensor) -> Any:
    """A tensor weight in the dtype of the delta, so that it does not widen it."""
    return weight.to(delta.dtype) if isinstance(weight, Tensor) else weight
