"""FRoD: the weight in a basis that layers of one role share, W' = U (diag(l) + S) V^T with sparse S.

V is stored per role; U holds the normalised columns of W V^-T, so the base is needed. Dense.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"frod_lambda_l", "frod_lambda_s_values"})


def delta_of(site: Site) -> Tensor:
    """frod_lambda_l (d_in,), frod_lambda_s_values (n,); of the role, frod_V (d_in, d_in), frod_s_indices (2, n)."""
    role = _role(site.module)
    V, places = site.whole(f"frod_V.{role}"), site.whole(f"frod_s_indices.{role}")
    if V is None or places is None:
        raise FormatError(f"{site.module}: the adapter has no frod_V.{role}: save it with save_projection=True")
    weight, V = site.weight().double(), V.double()
    mixed = torch.linalg.solve(V, weight.T).T
    sizes = mixed.norm(dim=0)
    U = torch.where(sizes > 1e-12, mixed / sizes.clamp_min(1e-12), 0.0)
    core = torch.diag(site["frod_lambda_l"].double())
    core.index_put_(tuple(places.long()), site["frod_lambda_s_values"].double(), accumulate=True)
    return (U @ core @ V.T - weight).float()


def _role(module: str) -> str:
    """PEFT's name for what a module does: its last two path parts, the last alone after a number."""
    parts = module.split(".")
    if len(parts) == 1 or parts[-2].isdigit():
        return parts[-1]
    if parts[-3:] == ["attention", "output", "dense"]:
        return "attention_output"
    return "_".join(parts[-2:])
