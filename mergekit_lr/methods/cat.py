"""The exact weighted sum of adapters, as their factors side by side: nothing is lost, ranks add up."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.delta import Delta, combine
from mergekit_lr.methods.registry import PerModel, method


@method("cat", paper="PEFT", takes="factors")
def cat(factors: Sequence[LowRank], /, *, weights: PerModel = 1.0) -> Delta:
    """The factors of all adapters side by side: exactly sum_t w_t B_t A_t.

    Args:
        factors: T ``LowRank`` of any ranks.
        weights: one number per model, folded into B.
    """
    return combine(weights, factors)
