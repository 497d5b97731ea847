"""LASER (arXiv 2312.13558): a weight matrix replaced by its low-rank approximation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from torch import Tensor

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import from_triplets, triplets, widened
from mergekit_lr.methods.registry import method


def unchanged(models: Sequence[Tensor], /, **_: Any) -> Tensor:
    """The tensor as it is."""
    return models[0]


@method("laser", paper="2312.13558", takes="weights", vectors=unchanged, models=(1, 1))
def laser(models: Sequence[Tensor], /, *, keep: float = 0.01, tolerance: float = 1e-3) -> Tensor:
    """The weight's best approximation of rank floor(keep min(m, n)), at least 1. Vectors stay as they are.

    Formula:
        W_1 = U S V^T
        merged = U_k S_k V_k^T
        k = max(1, floor(keep min(m, n)))

    Args:
        models: one weight (..., m, n).
        keep: the share of the rank that is kept; 1 leaves the weight as it is.
        tolerance: by what share the error may exceed the least possible.

    Use when:
        Some matrices, mostly of late MLP layers, are reduced in rank and the effect is measured; name them in
        targets.

    Not when:
        Applied to the whole model: most layers lose by it.

    Cost:
        O(m n k) by a randomized range finder.

    Example:
        {keep: 0.5}

    Raises:
        UsageError: ``keep`` is not between 0 and 1.
    """
    if not 0 <= keep <= 1:
        raise UsageError(f"laser: 'keep' must be from 0 to 1, got {keep:g}")
    if keep == 1:
        return models[0]
    weight = widened(models[0])
    rank = max(1, int(keep * min(weight.shape[-2:])))
    merged = from_triplets(*triplets(weight, rank, tolerance=tolerance), weight)
    assert isinstance(merged, Tensor)
    return merged
