"""The weighted sum of deltas, cut off at a rank: the best low-rank merge in the Frobenius norm (Eckart-Young)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, combine, from_triplets, scaled, triplets
from mergekit_lr.methods.registry import Number, PerModel, method


def summed(deltas: Sequence[Delta], /, *, weights: PerModel, scale: Number = 1.0, **_: Any) -> Delta:
    """The weighted sum: vectors have no rank to cut off."""
    return scaled(combine(weights, deltas), scale)


@method("svd", paper="Eckart-Young", takes="deltas", vectors=summed, factored=True)
def svd(
    deltas: Sequence[Delta], /, *, rank: int, weights: PerModel = 1.0, scale: Number = 1.0, tolerance: float = 1e-3
) -> Delta:
    """The best approximation of the weighted sum of the given rank. Vectors are summed.

    Formula:
        sum_t w_t delta_t = U S V^T
        merged = scale U_k S_k V_k^T, k = rank

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``, of which no dense matrix is formed.
        rank: of the result; at or above the rank of the sum nothing is lost.
        weights: one number for each model.
        scale: multiplies the result.
        tolerance: by what share a dense sum's truncation error may exceed the least possible.

    Use when:
        Adapters are summed and the result must have a given rank: the least error of any adapter of that rank.

    Not when:
        The sum itself is the problem, as with conflicting tasks; or the rank may grow: cat loses nothing.

    Cost:
        Factors: O((m + n) R^2 + R^3). Dense deltas: O(m n rank) by a randomized range finder.

    Example:
        {rank: 8}

    Raises:
        UsageError: ``rank`` is less than 1.
    """
    if rank < 1:
        raise UsageError(f"svd: 'rank' must be 1 or more, got {rank}")
    total = scaled(combine(weights, deltas), scale)
    if isinstance(total, LowRank):
        return total.truncate(rank).delta
    return from_triplets(*triplets(total, rank, tolerance=tolerance), total)
