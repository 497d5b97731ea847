"""HiRA (ICLR 2025): delta = W * (B A), a Hadamard product with the base; dense, and needs the base."""

from __future__ import annotations

from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"hira_A", "hira_B"})


def delta_of(site: Site) -> Tensor:
    """hira_A (r, d_in), hira_B (d_out, r) -> (d_out, d_in)."""
    return site.weight() * (site["hira_B"].flatten(1) @ site["hira_A"].flatten(1))
