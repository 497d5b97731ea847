"""The combinations of adapters that PEFT's ``add_weighted_adapter`` offers, for results that agree with it.

Those without ``svd`` merge the factors, A with A and B with B, each times sqrt|w s|: products of one adapter's B with
another's A appear in the result, so "linear" is not the weighted sum of the deltas ("cat" is). Those with ``svd``
merge the dense deltas and truncate. Random ones have PEFT's distribution, not its bits.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import MismatchError
from mergekit_lr.methods.consensus import elected_sum, weighted_sum
from mergekit_lr.methods.dare import drop, inverse
from mergekit_lr.methods.delta import combine
from mergekit_lr.methods.registry import PerModel, Share, method
from mergekit_lr.methods.ties import keep_largest

Combination = Literal[
    "linear", "cat", "svd", "ties", "ties_svd", "dare_linear", "dare_linear_svd", "dare_ties", "dare_ties_svd",
    "magnitude_prune", "magnitude_prune_svd",
]  # fmt: skip


@method("factor_average", paper="PEFT", takes="factors")
def factor_average(factors: Sequence[LowRank], /, *, weights: PerModel = 1.0) -> LowRank:
    """PEFT's "linear": A and B averaged apart, which is not the weighted sum of the deltas.

    Formula:
        A = sum_t sgn(w_t s_t) sqrt(|w_t s_t|) A_t
        B = sum_t sqrt(|w_t s_t|) B_t
        merged = B A

    Args:
        factors: T ``LowRank`` of one rank.
        weights: one number for each model.

    Use when:
        A result of PEFT's add_weighted_adapter with combination_type linear must be reproduced.

    Not when:
        The sum of the deltas is meant: products of one adapter's B with another's A appear here. cat and svd
        are the sum.

    Cost:
        O((m + n) R).

    Example:
        {weight: 0.5}

    Raises:
        MismatchError: the ranks differ.
    """
    return _by_factor(factors, weights, "linear", [1.0] * len(factors), "total", ())


@method("peft", paper="PEFT", takes="factors")
def peft(
    factors: Sequence[LowRank],
    /,
    *,
    keys: Sequence[Sequence[int]] = (),
    combination: Combination = "svd",
    weights: PerModel = 1.0,
    density: Share = 1.0,
    majority_sign_method: Literal["total", "frequency"] = "total",
    rank: int | None = None,
    clamp: float | None = None,
) -> LowRank:
    """Combines adapters as PEFT's ``add_weighted_adapter`` does.

    Formula:
        linear: A = sum_t sgn(w_t s_t) sqrt(|w_t s_t|) A_t, B = sum_t sqrt(|w_t s_t|) B_t
        svd: merged = rank-k part of sum_t w_t s_t B_t A_t

    Args:
        factors: T ``LowRank``; of one rank for combinations without "svd" and other than "cat".
        keys: streams of random numbers for the "dare" ones: for each model one per matrix of the batch.
        combination: PEFT's ``combination_type``.
        weights: one number for each model.
        density: the share that is kept, of each factor or delta.
        majority_sign_method: elect the sign of the sum, or the sign that most have.
        rank: of the "svd" ones; without it the largest of the adapters'.
        clamp: PEFT's ``svd_clamp``: the quantile of both factors' elements at which they are cut off.

    Use when:
        A result of PEFT's add_weighted_adapter must be reproduced, whichever combination_type it had.

    Not when:
        Nothing has to be reproduced: ties in the space core is cheaper than ties_svd and forms no dense delta.

    Cost:
        Combinations by factor: O((m + n) R). svd alone: O((m + n) R^2 + R^3). The other svd ones form the dense
        delta: O(m n min(m, n)).

    Example:
        {combination: ties, density: 0.5}

    Raises:
        MismatchError: the ranks differ.
    """
    if combination == "cat":
        merged = combine(weights, factors)
        assert isinstance(merged, LowRank)
        return merged
    if not combination.endswith("svd"):
        return _by_factor(factors, weights, combination, density, majority_sign_method, keys)
    rank = max(factor.rank for factor in factors) if rank is None else rank
    if combination == "svd" and clamp is None:
        merged = combine(weights, factors)
        assert isinstance(merged, LowRank)
        return merged.truncate(rank).delta
    kind = combination.removesuffix("svd").removesuffix("_") or "linear"
    dense = [factor.dense() for factor in factors]
    merged = _merge(dense, weights, kind, density, majority_sign_method, keys)
    U, S, Vh = torch.linalg.svd(merged.double(), full_matrices=False)
    B, A = (U[..., :rank] * S[..., None, :rank]).to(merged.dtype), Vh[..., :rank, :].to(merged.dtype)
    if clamp is not None:
        limit = torch.cat([B.flatten(-2), A.flatten(-2)], -1).quantile(clamp, dim=-1)[..., None, None]
        B, A = B.clamp(-limit, limit), A.clamp(-limit, limit)
    return LowRank(A, B)


def _by_factor(
    factors: Sequence[LowRank], weights: list[Any], kind: str, density: list[Any], majority: str, keys: Any
) -> LowRank:
    ranks = [factor.rank for factor in factors]
    if len(set(ranks)) > 1:
        raise MismatchError(f"the combination {kind!r} takes adapters of one rank, got {ranks}; use 'svd' or 'cat'")
    given = [torch.as_tensor(w * f.scaling) for w, f in zip(weights, factors, strict=True)]
    roots = [w.abs().sqrt() for w in given]
    A = [factor.A.to(factor.compute_dtype) for factor in factors]
    B = [factor.B.to(factor.compute_dtype) for factor in factors]
    signed = [r * w.sign() for r, w in zip(roots, given, strict=True)]
    other = [[key ^ 1 for key in model] for model in keys]  # A and B are drawn from streams of their own
    return LowRank(_merge(A, signed, kind, density, majority, keys), _merge(B, roots, kind, density, majority, other))


def _merge(
    tensors: list[Tensor], weights: list[Any], kind: str, density: list[Any], majority: str, keys: Any
) -> Tensor:
    """One of PEFT's rules on T tensors."""
    sparse = _sparse(tensors, kind, density, keys)
    if not kind.endswith("ties"):
        return weighted_sum(sparse, weights, normalize=False)
    votes = "sum" if majority == "total" else "count"
    return elected_sum(sparse, weights, divisor="count", elect_on="unweighted", majority=votes)


def _sparse(tensors: list[Tensor], kind: str, density: list[Any], keys: Any) -> Iterator[Tensor]:
    for t, tensor in enumerate(tensors):
        if kind == "linear":
            yield tensor
        elif kind.startswith("dare"):
            kept = drop(tensor, keys[t], density[t]) if keys else tensor
            yield kept * inverse(density[t], kept)
        else:
            yield keep_largest(tensor, density[t])
