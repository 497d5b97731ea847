"""Isotropic merging, Iso-C (arXiv 2502.04959): the sum of the deltas with all its singular values made equal.

With sum_t w_t delta_t = U S V^T the result is mean(S) U V^T: the polar factor times the nuclear norm over a count,
so no SVD is needed. Of factors it stays factors: O((m + n) R^2) for a total rank R.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import torch
from lrgpu.polar import polar
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.delta import Delta, combine, from_triplets, scaled, triplets
from mergekit_lr.methods.registry import Number, PerModel, method

Support = Literal["range", "range_full_mean", "full"]


def mean(deltas: Sequence[Delta], /, *, weights: PerModel = None, scale: Number = 1.0, **_: Any) -> Delta:
    """The weighted sum divided by T: what the spectral methods do with vectors, where they take sums of matrices."""
    count = len(deltas)
    return scaled(combine([weight / count for weight in weights or [1] * count], deltas), scale)


@method(
    "iso_c",
    paper="2502.04959",
    takes="deltas",
    spaces=("full", "core", "knots"),
    vectors=mean,
    factored=True,
    basis="any",
    spectral=True,
)
def iso_c(
    deltas: Sequence[Delta],
    /,
    *,
    weights: PerModel = 1.0,
    scale: Number = 1.0,
    support: Support = "range",
    blend: Number = 1.0,
) -> Delta:
    """The weighted sum with every singular value replaced by their mean. Vectors are averaged.

    Formula:
        sum_t w_t delta_t = U S V^T
        merged = scale mean(S) U V^T

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``.
        weights: one number for each model, inside the sum.
        scale: multiplies the result; the paper tunes it between 0.1 and 3 on held-out data.
        support: which directions count. "range": those of the numerical range, rho of them, and the mean is over
            rho. "range_full_mean": the same, with the mean over min(m, n). "full": all min(m, n), the null vectors
            that LAPACK happens to choose included; for a dense sum of full rank all three agree.
        blend: 0 leaves the sum as it is, 1 makes it isotropic, between them singular values are interpolated.

    Use when:
        Several tasks of one base share directions and few strong ones hide the rest. Tune scale between 0.1 and
        3 on held-out data.

    Not when:
        There is no data to tune scale with, or the result shall be truncated to a low rank afterwards: a flat
        spectrum has no tail to drop.

    Cost:
        Dense: a polar factor, some matrix products of O(m n min(m, n)), no SVD. Factors of total rank R: O((m +
        n) R^2).

    Example:
        {scale: 1.0}
    """
    total = combine(weights, deltas)
    level = flattened(total, support)
    if not isinstance(blend, Tensor) and blend == 1:
        return scaled(level, scale)
    return scaled(combine([1 - blend, blend], [total, level]), scale)


def flattened(total: Delta, support: Support = "range") -> Delta:
    """The delta with its singular values replaced by their mean."""
    p = min(total.shape[-2:])
    if support == "full":
        dense = total.dense() if isinstance(total, LowRank) else total
        U, S, Vh = torch.linalg.svd(dense.double(), full_matrices=False)
        return (S.mean(-1)[..., None, None] * (U @ Vh)).to(dense.dtype)
    if isinstance(total, LowRank):
        U, S, Vh = triplets(total)
        counts = S > 0
        divisor = counts.sum(-1, keepdim=True).clamp_min(1) if support == "range" else p
        level = S.double().sum(-1, keepdim=True) / divisor
        return from_triplets(U, (level * counts).to(U.dtype), Vh, total)
    P, nuclear, rank = polar(total)
    divisor = rank.clamp_min(1) if support == "range" else p
    return P * (nuclear / divisor)[..., None, None].to(P.dtype)
