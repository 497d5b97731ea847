"""OSF (arXiv 2504.07097): the base's leading singular part is kept, the rest replaced; dense, needs the base."""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({f"osf_svd_params.{name}" for name in ("U_low", "S_low", "V_low")})


def delta_of(site: Site) -> Tensor:
    """U_low (d_out, q), S_low (q,), V_low (q, d_in), q = min(d_out, d_in) minus the rank that is kept."""
    U, S, Vh = torch.linalg.svd(site.weight().double(), full_matrices=False)
    low, scales = site["osf_svd_params.U_low"].double(), site["osf_svd_params.S_low"].double()
    kept = len(S) - len(scales)
    replaced = (U[:, kept:] * S[kept:]) @ Vh[kept:]
    return ((low * scales) @ site["osf_svd_params.V_low"].double() - replaced).float()
