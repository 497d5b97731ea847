"""CART (arXiv 2412.12153): the average of the fine-tunes plus the low-rank part of what sets each apart from it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, combine, from_triplets, scaled, triplets
from mergekit_lr.methods.iso_c import mean
from mergekit_lr.methods.registry import Number, method


@method(
    "cart",
    paper="2412.12153",
    takes="deltas",
    spaces=("full", "core", "knots"),
    vectors=mean,
    factored=True,
    basis="any",
)
def cart(
    deltas: Sequence[Delta],
    /,
    *,
    fraction: float = 0.08,
    strength: Number = 1.0,
    centered: bool = True,
    round_up: bool = False,
) -> Delta:
    """The mean delta plus the truncated residuals from it. Vectors are averaged.

    mean + strength sum_t SVD_k(delta_t - mean), k = fraction min(m, n). At fraction 1 that is the mean, whatever the
    strength.

    Formula:
        C = mean_t delta_t
        delta_t - C = U_t S_t V_t^T
        merged = C + strength sum_t U_(t,k) S_(t,k) V_(t,k)^T

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``.
        fraction: the share of singular values kept of each residual; at least one is.
        strength: multiplies the residuals; the paper tunes it.
        centered: off, the deltas themselves are truncated and summed, without a mean.
        round_up: k is rounded up instead of down.

    Use when:
        Many tasks share much: the mean holds that, and each adds the low-rank part of what sets it apart.

    Not when:
        strength cannot be tuned: the paper's values are 1 to 3.

    Cost:
        T truncated SVDs. Factors stay factors: O((m + n) R^2 + R^3).

    Example:
        {fraction: 0.08, strength: 2.0}

    Raises:
        UsageError: ``fraction`` is not between 0 and 1.
    """
    if not 0 <= fraction <= 1:
        raise UsageError(f"cart: 'fraction' must be from 0 to 1, got {fraction:g}")
    p = min(deltas[0].shape[-2:])
    k = max(1, math.ceil(p * fraction) if round_up else int(p * fraction))
    average = combine([1 / len(deltas)] * len(deltas), deltas)
    kept = []
    for delta in deltas:
        rest = combine([1, -1], [delta, average]) if centered else delta
        kept.append(from_triplets(*triplets(rest, k), delta))
    terms = combine([strength] * len(kept), kept)
    return combine([1, 1], [average, terms]) if centered else scaled(terms, 1)
