"""VB-LoRA (arXiv 2405.15179): factors whose sub-vectors are mixtures of a shared bank, exactly low-rank.

Each sub-vector of A and of B^T is a softmax-weighted sum of the ``topk`` best bank vectors. A file saved with
``save_only_topk_weights`` holds their indices and all weights but the last, which is one minus the others.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({f"vblora_logits_{side}{part}" for side in "AB" for part in ("", "_topk_indices", "_topk_weights")})


def delta_of(site: Site) -> LowRank:
    """vblora_logits_A (r, d_in / v, h), _B (d_out / v, r, h), and the bank vblora_vector_bank (h, v)."""
    bank = site.whole("vblora_vector_bank")
    if bank is None:
        raise FormatError(f"{site.module}: the adapter has no base_model.vblora_vector_bank, which it needs")
    A = _mixtures(site, "vblora_logits_A", bank).flatten(1)
    B = _mixtures(site, "vblora_logits_B", bank).transpose(1, 2).flatten(0, 1)
    return LowRank(A, B)


def _mixtures(site: Site, name: str, bank: Tensor) -> Tensor:
    """Mixed sub-vectors, logits (p, q, h) -> (p, q, v)."""
    if name in site.tensors:
        logits, indices = site[name].topk(site.config["topk"], dim=-1)
        weights = logits.softmax(-1)
    else:
        first = site[f"{name}_topk_weights"]
        weights = torch.cat((first, 1 - first.sum(-1, keepdim=True)), dim=-1)
        indices = site[f"{name}_topk_indices"].long()
    return (weights.unsqueeze(-1) * bank[indices]).sum(-2)
