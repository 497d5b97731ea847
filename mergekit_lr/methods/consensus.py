"""Sums of deltas, with a sign elected in every element, in one pass: at most five accumulators, never T tensors.

The elected sign is that of the sum, and only elements of that sign are added up. Both are known from the sum of the
positive and the sum of the negative parts alone, and the divisors from the weights that stand behind each.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lr.methods.linear import normalized

Divisor = Literal["none", "weights", "count"]


def weighted_sum(deltas: Iterable[Tensor], weights: list[Any], *, normalize: bool) -> Tensor:
    """sum_t w_t delta_t, over the sum of the weights with ``normalize`` (unless that is 0)."""
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
        deltas: T tensors (..., m, n), sparse or not; each is read once, in order.
        weights: T numbers or tensors (..., 1, 1).
        divisor: divide by nothing, by the sum of the weights of what was added, or by how many were.
        elect_on: elect on w_t delta_t, or on delta_t alone.
        majority: the sign of the sum, or the sign that most have.
        zero_sign: what an exact zero elects: +, or the sign that prevails among all the tensor's elections.
    """
    sums: _Sides | None = None
    for weight, delta in zip(weights, deltas, strict=True):
        sums = sums or _Sides(delta, divisor, elect_on, majority)
        sums.add(delta, _like(weight, delta))
    assert sums is not None
    return sums.merged(zero_sign)


class _Sides:
    """What is summed on the positive and on the negative side: values, votes, divisors.

    Conditions are held as 0.0 and 1.0: on a CPU, arithmetic with those is many times faster than with booleans.
    """

    def __init__(self, like: Tensor, divisor: Divisor, elect_on: str, majority: str):
        self.divisor, self.unweighted, self.counted = divisor, elect_on == "unweighted", majority == "count"
        self.up, self.down = torch.zeros_like(like), torch.zeros_like(like)
        # The vote is the sum of both sides, unless it is another one.
        self.vote = torch.zeros_like(like) if self.unweighted or self.counted else None
        self.divisors = (torch.zeros_like(like), torch.zeros_like(like)) if divisor != "none" else None
        self.side = torch.empty_like(like)

    def add(self, delta: Tensor, weight: Any) -> None:
        weighted = delta * weight
        voter = delta if self.unweighted else weighted
        share = weight if self.divisor == "weights" else 1.0
        if not self.unweighted:
            self.up += weighted.clamp_min(0)
            self.down += weighted.clamp_max(0)
        for i, compare in enumerate((torch.gt, torch.lt)):
            if not self.unweighted and self.divisors is None:
                break
            compare(voter, 0, out=self.side)
            if self.unweighted:
                (self.up, self.down)[i].addcmul_(weighted, self.side)
            if self.divisors is not None:
                if isinstance(share, Tensor):
                    self.divisors[i].add_(self.side * share)
                else:
                    self.divisors[i].add_(self.side, alpha=share)
        if self.vote is not None:
            self.vote += voter.sign() if self.counted else voter

    def merged(self, zero_sign: str) -> Tensor:
        votes = self.up + self.down if self.vote is None else self.vote
        elected = torch.ge(votes, 0, out=self.side)
        if zero_sign == "majority":
            prevailing = votes.sign().sum((-2, -1), keepdim=True) >= 0
            elected = torch.where(votes == 0, prevailing.to(elected.dtype), elected)
        total = torch.lerp(self.down, self.up, elected)  # exactly one of the two
        if self.divisors is None:
            return total
        positive, negative = self.divisors
        divisor = torch.lerp(negative, positive, elected)
        return total.div_(divisor.add_(torch.eq(divisor, 0, out=self.side)))


def _like(weight: Any, delta: Tensor) -> Any:
    """A tensor weight in the dtype of the delta, so that it does not widen it."""
    return weight.to(delta.dtype) if isinstance(weight, Tensor) else weight
