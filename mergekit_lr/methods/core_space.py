"""Core Space merging (arXiv 2509.17786) of adapters: any method on deltas, in the coordinates of their joint bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, as_dense, stacked, unstacked
from mergekit_lr.methods.iso_c import flattened
from mergekit_lr.methods.registry import find, method
from mergekit_lr.methods.spaces import core_basis, lifted


@method("core_space", paper="2509.17786", takes="factors")
def core_space(
    factors: Sequence[LowRank],
    /,
    *,
    keys: Sequence[Sequence[int]] = (),
    inner: str = "task_arithmetic",
    isotropize: bool = False,
    rank: int | None = None,
    **parameters: Any,
) -> Delta:
    """Merges adapters by another method in the coordinates of their joint bases; the result is an adapter.

    Formula:
        delta_t = U M_t V^T, U and V bases of all B_t and all A_t
        merged = U inner(M_1, ..., M_T) V^T

    Args:
        factors: T ``LowRank`` of any ranks.
        keys: streams of random numbers, for an inner method that draws: for each model one per matrix of the batch.
        inner: the method that merges the coordinates.
        isotropize: make the singular values of the merged coordinates equal, as Iso-C does.
        rank: truncate the result to this rank; without it at most the sum of the adapters' ranks.
        parameters: of the inner method; not different for the matrices of a batch.

    Use when:
        Adapters are merged by a method that would otherwise take dense deltas. A recipe can say the same with
        space: core and the method's own name; this name adds isotropize and rank.

    Not when:
        Inputs are not low-rank, or the ranks sum up to the size of the layer: nothing is gained.

    Cost:
        O((m + n) R^2 + R^3) for a total rank R, plus the inner method on matrices of R x R.

    Example:
        {inner: ties, density: 0.5, isotropize: false}

    Raises:
        UsageError: the inner method does not run in Core Space.
    """
    rule = find(inner)
    if "core" not in rule.spaces:
        raise UsageError(f"core_space: {inner} does not run on coordinates; choose a method on deltas with that space")
    if len(factors[0].shape) > 2:  # ranks, and so the sizes of the coordinates, differ within a batch
        batch = unstacked(factors)
        streams = zip(*keys, strict=True) if keys else [()] * len(batch)
        merged = [
            core_space(one, keys=[[key] for key in own], inner=inner, isotropize=isotropize, rank=rank, **parameters)
            for one, own in zip(batch, streams, strict=True)
        ]
        return stacked(merged, factors[0])
    basis = core_basis(factors, singular=rule.basis == "own")
    random: dict[str, Any] = {"keys": keys} if rule.random else {}
    coordinates = as_dense(rule.function(basis.coordinates, **random, **parameters))
    result = lifted(as_dense(flattened(coordinates)) if isotropize else coordinates, basis)
    return result if rank is None else result.truncate(rank).delta
