"""Task singular vectors, TSV-M (arXiv 2412.00081): the tasks' leading singular triplets, made orthogonal and summed.

The left vectors of all tasks side by side, U (m, sum k), are replaced by the nearest orthonormal ones,
U (U^T U)^(-1/2), and so are the right ones: the result has exactly the kept singular values. The whitening needs the
Gram matrix alone, and adapters stay factors: O((m + n) R^2 + R^3).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from lrgpu.polar import polar
from torch import Tensor

from mergekit_lr.methods.delta import Delta, from_triplets, scaled, triplets
from mergekit_lr.methods.iso_c import mean
from mergekit_lr.methods.registry import Number, PerModel, method


@method(
    "tsv_m",
    paper="2412.00081",
    takes="deltas",
    spaces=("full", "core", "knots"),
    vectors=mean,
    factored=True,
    basis="any",
    spectral=True,
)
def tsv_m(
    deltas: Sequence[Delta],
    /,
    *,
    weights: PerModel = 1.0,
    scale: Number = 1.0,
    rank: int | None = None,
    tolerance: float = 1e-5,
) -> Delta:
    """The leading singular triplets of each delta, decorrelated between tasks. Vectors are averaged.

    Formula:
        w_t delta_t = U_t S_t V_t^T + rest, of rank k
        merged = scale polar([U_1 ... U_T]) diag(S_1, ..., S_T) polar([V_1 ... V_T])^T

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``.
        weights: one number for each model.
        scale: multiplies the result.
        rank: triplets of each task; without it floor(min(m, n) / T). Never more than a delta has: null vectors
            would disturb those that count.
        tolerance: by what share a dense delta's truncation error may exceed the least possible. Whitening tells
            apart what truncation hardly does: with 2e-3 above the least, a third of the merge was another one.

    Use when:
        Many tasks of one base, no data to tune with: scale 1 is usable as it is. lrmerge compare shows high
        interference.

    Not when:
        Deltas need more than their share of the rank, min(m, n) / T, or are two versions of one task: whitening
        pushes them apart.

    Cost:
        T truncated SVDs of rank k and two polar factors from T k x T k Gram matrices. Factors stay factors:
        O((m + n) R^2 + R^3).

    Example:
        {scale: 1.0}
    """
    m, n = deltas[0].shape[-2:]
    k = max(1, min(m, n) // len(deltas)) if rank is None else min(rank, m, n)
    parts = [triplets(scaled(delta, w), k, tolerance=tolerance) for delta, w in zip(deltas, weights, strict=True)]
    U = torch.cat([part.U for part in parts], -1)
    S = torch.cat([part.S for part in parts], -1)
    V = torch.cat([part.Vh for part in parts], -2).mT
    return scaled(from_triplets(whitened(U), S, whitened(V).mT, deltas[0]), scale)


def whitened(X: Tensor) -> Tensor:
    """The nearest matrix to X (..., m, k) with orthonormal columns, or rows if k > m, on its numerical range.

    Zero columns stay zero. Directions that several blocks share but for rounding count once. X has orthonormal blocks,
    so rounding is a few units of its last place, and many blocks leave true directions that are hardly longer.
    """
    return polar(X, floor=64 * torch.finfo(X.dtype).eps).P
