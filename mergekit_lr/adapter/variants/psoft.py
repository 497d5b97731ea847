"""PSOFT (arXiv 2505.11235): a rotation inside the base's leading singular subspace, exactly low-rank.

delta = U S (R - I) V^T over the top r singular triplets of the base, R a Cayley rotation with magnitudes.
The base is decomposed again, as PEFT does when it loads one.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.oft import cayley, skew
from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"psoft_R.weight", "psoft_R.vector_a", "psoft_R.vector_b"})


def delta_of(site: Site) -> LowRank:
    """psoft_R.weight (r (r - 1) / 2,) or (r, r) unconstrained; vector_a, vector_b (r,).

    R acts between individual singular vectors, so their signs and order matter: they are LAPACK's.
    """
    config, rank = site.config, site.config["r"]
    if config.get("psoft_svd", "full") != "full":
        raise FormatError(f"{site.module}: PSOFT over a random SVD cannot be repeated exactly, only psoft_svd=full")
    U, S, Vh = torch.linalg.svd(site.weight(), full_matrices=False)
    U, S, Vh = U[:, :rank], S[:rank], Vh[:rank]
    change = _rotation(site) - torch.eye(rank)
    if config.get("ab_svd_init", "psoft_init") == "pissa_init":
        root = S.sqrt()
        return LowRank(change @ (root[:, None] * Vh), U * root)
    return LowRank(change @ Vh, U * S)


def _rotation(site: Site) -> Tensor:
    config, R = site.config, site["psoft_R.weight"]
    if config.get("psoft_orth", True):
        Q = skew(R[None])
        terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None
        eps = config.get("cayley_neumann_eps")
        if terms is not None and eps is not None:
            Q = Q * (eps / Q.norm().clamp_min(eps))
        R = cayley(Q if terms is not None else -Q, terms)[0]
    if "psoft_R.vector_b" in site.tensors:
        R = site["psoft_R.vector_b"][:, None] * R
    if "psoft_R.vector_a" in site.tensors:
        R = R * site["psoft_R.vector_a"][None, :]
    return R
