"""LoKr (LyCORIS, arXiv 2309.14859): a Kronecker product w1 x w2 of two small matrices, each full or factored.

(B1 A1) x (B2 A2) = (B1 x B2)(A1 x A2): exactly low-rank, of rank r1 r2. A full matrix counts as factors of its
shorter side. Where that rank would not be below the matrix's own sides, the delta is dense.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site, part

TENSORS = frozenset({f"lokr_{part}" for part in ("w1", "w1_a", "w1_b", "w2", "w2_a", "w2_b", "t2")})


def delta_of(site: Site) -> LowRank | Tensor:
    """lokr_w1 (a, b), lokr_w2 (c, d, *kernel) -> (a c, b d * kernel); scale alpha / r even for full ones."""
    scaling = site.option("alpha", "alpha_pattern") / site.option("r", "rank_pattern")
    return product(site.tensors, scaling, site.module)


def product(tensors: Mapping[str, Tensor], scaling: float, module: str = "module") -> LowRank | Tensor:
    """The delta of one module's ``lokr_*`` tensors: factors where they are smaller than the matrix."""
    B1, A1 = _factors(tensors, "1", module)
    B2, A2 = _factors(tensors, "2", module)
    sides = len(B1) * len(B2), A1.shape[1] * A2.shape[1]
    if A1.shape[0] * A2.shape[0] < min(sides):
        return LowRank(_kron(A1, A2), _kron(B1, B2), scaling)
    return _kron(B1 @ A1, B2 @ A2) * scaling


def _factors(tensors: Mapping[str, Tensor], which: str, module: str) -> tuple[Tensor, Tensor]:
    """One of the two matrices, flat behind its first axis, as B (m, r) and A (r, n)."""
    if f"lokr_w{which}" in tensors:
        full = part(tensors, f"lokr_w{which}", module).flatten(1)
        rows, columns = full.shape
        identity = torch.eye(min(rows, columns), dtype=full.dtype)
        return (identity, full) if rows <= columns else (full, identity)
    a, b = part(tensors, f"lokr_w{which}_a", module), part(tensors, f"lokr_w{which}_b", module)
    if f"lokr_t{which}" not in tensors:
        return a, b.flatten(1)
    core = part(tensors, f"lokr_t{which}", module)  # (r, r, *kernel) between a (r, c) and b (r, d)
    return a.T, torch.einsum("ij...,jn->in...", core, b).flatten(1)


def _kron(one: Tensor, two: Tensor) -> Tensor:
    """torch.kron, which fails on transposed factors of one row."""
    return torch.einsum("ab,cd->acbd", one, two).flatten(2).flatten(0, 1)
