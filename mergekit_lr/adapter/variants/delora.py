"""DeLoRA (arXiv 2503.18225): rank-one terms of unit size times a learnt strength, exactly low-rank.

delta = sum_i (lambda / r) b_i a_i^T / (|b_i| |a_i|), its columns scaled by the base's column norms (stored).
"""

from __future__ import annotations

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"delora_A", "delora_B", "delora_lambda", "delora_w_norm"})


def delta_of(site: Site) -> LowRank:
    """delora_A (r, d_in), delora_B (d_out, r), delora_lambda (1,), delora_w_norm (d_in,)."""
    A, B = site["delora_A"], site["delora_B"]
    sizes = A.norm(dim=1).clamp_min(1e-4) * B.norm(dim=0).clamp_min(1e-4)
    strength = site["delora_lambda"] / len(A) / sizes
    return LowRank(A * site["delora_w_norm"], B * strength)
