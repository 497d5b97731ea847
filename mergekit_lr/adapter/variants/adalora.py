"""AdaLoRA (arXiv 2303.10512): an SVD-shaped adapter, delta = s * B diag(E) A, exactly low-rank.

The scale is lora_alpha over the rank that training began with, ``init_r``: pruning removes directions from
the file and leaves the scale. PEFT adds 1e-5 to that rank, and so do we, to give the same weights.
"""

from __future__ import annotations

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"lora_A", "lora_B", "lora_E"})


def delta_of(site: Site) -> LowRank:
    """lora_A (r, d_in), lora_E (r, 1), lora_B (d_out, r)."""
    rank = site.config["init_r"]
    alpha = site.config["lora_alpha"]
    scale = (alpha if alpha > 0 else float(rank)) / (rank + 1e-5)
    return LowRank(site["lora_E"] * site["lora_A"], site["lora_B"], scale)
