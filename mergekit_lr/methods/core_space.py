"""Core Space merging (arXiv 2509.17786) of adapters: any method on deltas, in the coordinates of their joint bases."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import as_dense
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
) -> LowRank:
    """Merges adapters by another method in the coordinates of their joint bases; the result is an adapter.

    Args:
        factors: T ``LowRank`` (m, n), of any ranks.
        keys: streams of random numbers, for an inner method that draws.
        inner: the method that merges the coordinates.
        isotropize: make the singular values of the merged coordinates equal, as Iso-C does.
        rank: truncate the result to this rank; without it at most the sum of the adapters' ranks.
        parameters: of the inner method.

    Raises:
        UsageError: the inner method does not run in Core Space.
    """
    rule = find(inner)
    if "core" not in rule.spaces:
        raise UsageError(f"core_space: {inner} does not run on coordinates; choose a method on deltas with that space")
    if len(factors[0].shape) > 2:
        raise UsageError("core_space takes one matrix at a time; run the inner method in the space 'core' for a batch")
    basis = core_basis(factors)
    random: dict[str, Any] = {"keys": keys} if rule.random else {}
    merged = as_dense(rule.function(basis.coordinates, **random, **parameters))
    result = lifted(as_dense(flattened(merged)) if isotropize else merged, basis)
    return result if rank is None else result.truncate(rank).delta
