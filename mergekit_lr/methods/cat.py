"""The exact weighted sum of adapters, as their factors side by side: nothing is lost, ranks add up."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.delta import Delta, combine
from mergekit_lr.methods.registry import PerModel, method


@method("cat", paper="PEFT", takes="factors")
def cat(factors: Sequence[LowRank], /, *, weights: PerModel = 1.0) -> Delta:
    """The factors of all adapters side by side: exactly sum_t w_t B_t A_t.

    Formula:
        merged = sum_t w_t B_t A_t = [w_1 B_1 ... w_T B_T] [A_1; ...; A_T]

    Args:
        factors: T ``LowRank`` of any ranks.
        weights: one number for each model, folded into B.

    Use when:
        Adapters are summed and nothing may be lost. An output rank, energy or size truncates the sum
        afterwards, with the error printed.

    Not when:
        Adapters conflict, or the ranks would grow beyond what the server takes.

    Cost:
        A copy: no arithmetic but the weights.

    Example:
        {weight: 0.5}
    """
    return combine(weights, factors)
