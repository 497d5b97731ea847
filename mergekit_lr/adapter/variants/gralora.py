"""GraLoRA (arXiv 2505.20355): k x k blocks of rank r / k each, so low-rank as a whole: at most k r.

Input block n has A_n (d_in / k, r); its r columns fall into k groups, group o feeding output block o through
group n of B_o (r, d_out / k). A plain LoRA of rank ``hybrid_r`` may stand beside it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"gralora_A", "gralora_B", "gralora_A_general.weight", "gralora_B_general.weight"})


def delta_of(site: Site) -> LowRank:
    """gralora_A (k, d_in / k, r), gralora_B (k, r, d_out / k) -> rank k r (+ hybrid_r)."""
    A, B = site["gralora_A"], site["gralora_B"]
    count, _, rank = A.shape
    right = torch.block_diag(*A.mT)  # (k r, d_in): rows (n, o, i), i within the group of r / k
    left = _exchange(B, count, rank)  # (d_out, k r)
    hybrid = site.config.get("hybrid_r") or 0
    scale = site.config["alpha"] / (rank + hybrid)
    if not hybrid:
        return LowRank(right, left, scale)
    general_A, general_B = site["gralora_A_general.weight"], site["gralora_B_general.weight"]
    return LowRank(torch.cat((right, general_A)), torch.cat((left, general_B), dim=1), scale)


def _exchange(B: Tensor, count: int, rank: int) -> Tensor:
    """B (k, r, d_out / k) placed so that column (n, o, i) writes to output block o from its row (n, i)."""
    group = rank // count
    left = B.new_zeros(count, B.shape[2], count, count, group)  # (o, d_out / k, n, o', i)
    rows = B.reshape(count, count, group, -1)  # (o, n, i, d_out / k)
    for o in range(count):
        left[o, :, :, o] = rows[o].permute(2, 0, 1)
    return left.reshape(count * B.shape[2], count * rank)
