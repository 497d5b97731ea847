"""LoRA over a base that its initialisation changed: PiSSA, OLoRA, KaSA; exactly low-rank against the true base.

These take a part out of the base before training and repeat that on every load. Against the base as it is on
disk the change is what the factors say minus what was taken out: rank 2 r, and the base is needed to know it.
KaSA also learns a diagonal between its factors.

Sources: PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775, KaSA arXiv 2412.06071.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"lora_A.weight", "lora_B.weight", "lora_diag"})
METHODS = ("pissa", "olora", "kasa")


def method_of(config: Mapping[str, Any]) -> str | None:
    """What a LoRA's configuration says it took out of its base: "pissa", "olora", "kasa", or None for nothing."""
    if config.get("kasa_config"):
        return "kasa"
    start = config.get("init_lora_weights")
    return start if start in METHODS else None


def delta_of(site: Site) -> LowRank:
    """lora_A (r, d_in), lora_B (d_out, r), lora_diag (r,) in KaSA."""
    method = method_of(site.config)
    if method is None or site.config.get("use_dora"):
        raise FormatError(f"{site.module}: a LoRA that leaves its base alone, or a DoRA: read it as a PEFT folder")
    A, B = site["lora_A.weight"], site["lora_B.weight"]
    rank = len(A)
    alpha = site.option("lora_alpha", "alpha_pattern", 8)
    scaling = alpha / (rank**0.5 if site.config.get("use_rslora") else rank)
    if "lora_diag" in site.tensors:
        B = B * site["lora_diag"]
    return LowRank(A, B, scaling) - removed(site.weight(), rank, method)


def removed(weight: Tensor, rank: int, method: str) -> LowRank:
    """What ``method`` takes out of ``weight`` (d_out, d_in) at ``rank``.

    PiSSA takes the leading singular triplets, KaSA the last ones, OLoRA the first columns of Q and rows of R.
    """
    if method == "olora":
        Q, R = torch.linalg.qr(weight)
        return LowRank(R[:rank], Q[:, :rank])
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(None, rank) if method == "pissa" else slice(len(S) - rank, None)
    return LowRank(Vh[part].float(), (U[:, part] * S[part]).float())
