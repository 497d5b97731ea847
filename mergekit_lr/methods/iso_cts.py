"""Isotropic merging with task subspaces, Iso-CTS (arXiv 2502.04959): common directions, each task's own, one level.

The leading directions of the sum are kept, each task adds the leading directions of what they leave of it, both bases
are orthogonalised, and every direction gets the mean singular value. Cost: one SVD of the sum and T truncated ones.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import combine, scaled, triplets, widened
from mergekit_lr.methods.iso_c import mean
from mergekit_lr.methods.registry import Number, PerModel, method
from mergekit_lr.methods.tsv_m import whitened

_TOLERANCE = 1e-5  # of a truncation's error: whitening makes much of small differences (1e-3 here is 0.1 there)


@method(
    "iso_cts",
    paper="2502.04959",
    takes="deltas",
    spaces=("full", "core", "knots"),
    vectors=mean,
    basis="any",
    spectral=True,
)
def iso_cts(
    deltas: Sequence[Tensor],
    /,
    *,
    weights: PerModel = 1.0,
    scale: Number = 1.0,
    common_fraction: float = 0.8,
) -> Tensor:
    """Common directions of the sum and each task's own, all at the mean singular value. Vectors are averaged.

    Directions at the level of rounding, of low-rank or zero deltas, are left out. Adapters are merged in the space
    "core", where the same sizes are counted from the rank of the stack.

    Formula:
        sum_t w_t delta_t = U S V^T
        E_t = w_t delta_t - U_k U_k^T w_t delta_t = U_t S_t V_t^T
        merged = scale mean(S, S_1, ..., S_T) polar([U_k U_1 ... U_T]) polar([V_k V_1 ... V_T])^T

    Args:
        deltas: T tensors (..., m, n).
        weights: one number for each model.
        scale: multiplies the result.
        common_fraction: the share of the directions that comes from the sum; 1 gives Iso-C.

    Use when:
        As iso_c, with many tasks (from about ten): each gets directions of its own, which the sum alone would
        lose.

    Not when:
        There are few tasks: at two or three it is iso_c with more work.

    Cost:
        One truncated SVD of the sum and one of each delta; adapters in the space core, O((m + n) R^2 + R^3).

    Example:
        {common_fraction: 0.8}

    Raises:
        UsageError: ``common_fraction`` is not between 0 and 1.
    """
    if not 0 <= common_fraction <= 1:
        raise UsageError(f"iso_cts: 'common_fraction' must be from 0 to 1, got {common_fraction:g}")
    p, count = min(deltas[0].shape[-2:]), len(deltas)
    own = min(round((p - int(p * common_fraction)) / count), p // count)
    common = p - own * count
    total = triplets(combine(weights, deltas), common, tolerance=_TOLERANCE)
    blocks = [total]
    for weight, delta in zip(weights, deltas, strict=True):
        rest = scaled(widened(delta), weight)
        assert isinstance(rest, Tensor)
        rest = rest - total.U @ (total.U.mT @ rest)
        blocks.append(triplets(rest, own, tolerance=_TOLERANCE))
    U = torch.cat([block.U for block in blocks], -1)
    S = torch.cat([block.S for block in blocks], -1)
    V = torch.cat([block.Vh for block in blocks], -2).mT
    # The mean is over the directions there are: all p of full-rank deltas.
    level = S.double().sum(-1) / (S > 0).sum(-1).clamp_min(1)
    merged = whitened(U) @ whitened(V).mT
    result = scaled(merged * level[..., None, None].to(merged.dtype), scale)
    assert isinstance(result, Tensor)
    return result
