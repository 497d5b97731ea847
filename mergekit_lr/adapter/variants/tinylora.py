"""TinyLoRA: delta = B R A with A, B the base's leading singular directions and R = sum_i v_i P_i, r x r.

A, B and the random P_i are in the file when it was saved with its projections; v may be shared by modules.
"""

from __future__ import annotations

import torch

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"tinylora_A", "tinylora_B", "tinylora_P"})


def delta_of(site: Site) -> LowRank:
    """tinylora_A (r, d_in), tinylora_B (d_out, r), tinylora_P (u, r, r); of the adapter, tinylora_v.N (u,)."""
    groups = max(1, round(len(site.shapes) * (1 - site.config.get("weight_tying", 0.0))))
    group = min(site.order // max(1, len(site.shapes) // groups), groups - 1)
    v = site.whole(f"tinylora_v.{group}")
    if v is None:
        raise FormatError(f"{site.module}: the adapter has no tinylora_v.{group}, which this module's group uses")
    R = torch.einsum("u,uij->ij", v, site["tinylora_P"])
    return LowRank(R @ site["tinylora_A"], site["tinylora_B"])
