"""LoHa (arXiv 2108.06098): the Hadamard product of two low-rank matrices, exactly low-rank as a Khatri-Rao product.

(B1 A1) * (B2 A2) = B A with the columns of B all products of a column of B1 and one of B2, and the rows of A
likewise: rank r1 r2. A convolution's core (``hada_t1``, ``hada_t2``) folds into A.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site, part

TENSORS = frozenset({f"hada_{part}" for part in ("w1_a", "w1_b", "w2_a", "w2_b", "t1", "t2")})


def delta_of(site: Site) -> LowRank:
    """hada_w1_a (d_out, r), hada_w1_b (r, d_in), and the same for w2; scale alpha / r."""
    rank = site["hada_w1_b"].shape[0]
    return product(site.tensors, site.option("alpha", "alpha_pattern") / rank, site.module)


def product(tensors: Mapping[str, Tensor], scaling: float, module: str = "module") -> LowRank:
    """The delta of one module's ``hada_*`` tensors, (d_out, d_in * kernel)."""
    B1, A1 = _factors(tensors, "1", module)
    B2, A2 = _factors(tensors, "2", module)
    B = (B1[:, :, None] * B2[:, None, :]).flatten(1)
    A = (A1[:, None, :] * A2[None, :, :]).flatten(0, 1)
    return LowRank(A, B, scaling)


def _factors(tensors: Mapping[str, Tensor], which: str, module: str) -> tuple[Tensor, Tensor]:
    """B (d_out, r) and A (r, d_in * kernel) of one of the two matrices."""
    a, b = part(tensors, f"hada_w{which}_a", module), part(tensors, f"hada_w{which}_b", module)
    if f"hada_t{which}" not in tensors:
        return a, b.flatten(1)
    core = part(tensors, f"hada_t{which}", module)  # (r, r, *kernel) between a (r, d_out) and b (r, d_in)
    return a.T, torch.einsum("ij...,jn->in...", core, b).flatten(1)
