"""HRA (arXiv 2405.17484): r Householder reflections of the input, W' = W H_1 ... H_r.

The product is I - U T U^T with T triangular (the compact WY form), so the change of W is exactly low-rank:
delta = -(W U T) U^T, of rank r, given the base. With ``apply_GS`` U is orthonormalised first and T = 2 I.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"hra_u"})


def delta_of(site: Site) -> LowRank:
    """hra_u (d_in, r): the reflections' normals, one per column."""
    U = site["hra_u"].double()
    U = _orthonormal(U) if site.config.get("apply_GS") else U / U.norm(dim=0)
    left = site.weight().double() @ (U @ _triangle(U))
    return LowRank(U.T.float(), -left.float())


def _triangle(U: Tensor) -> Tensor:
    """T with prod_i (I - 2 u_i u_i^T) = I - U T U^T, built one reflection at a time."""
    rank = U.shape[1]
    T = U.new_zeros(rank, rank)
    for i in range(rank):
        T[i, i] = 2
        T[:i, i] = -2 * T[:i, :i] @ (U[:, :i].T @ U[:, i])
    return T


def _orthonormal(U: Tensor) -> Tensor:
    """Gram-Schmidt; a column's sign is free, since reflections do not see it."""
    return torch.linalg.qr(U).Q
