"""LoRA over a base that its initialisation changed: PiSSA, OLoRA, KaSA; exactly low-rank against the true base.

These take a part out of the base before training, and repeat that on every load. Against the base as it is on
disk the change is what the factors say minus what was taken out: rank 2 r, and the base is needed to know it.

Sources: PiSSA arXiv 2404.02948, OLoRA arXiv 2406.01775, KaSA arXiv 2412.06071.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError

# Initialisations that leave the base as it is on disk.
HARMLESS = (True, False, None, "gaussian", "orthogonal", "eva", "true", "false", "mfo")


def removed(weight: Tensor, rank: int, init: Any) -> LowRank | None:
    """What the initialisation ``init`` of rank ``rank`` takes out of ``weight`` (d_out, d_in), or None for nothing.

    Args:
        weight: The base's weight as a matrix.
        rank: The adapter's rank in this module.
        init: ``init_lora_weights`` of the configuration, or "kasa".

    Raises:
        UsageError: an initialisation that cannot be repeated from the base alone (random, or from data).
    """
    if init in HARMLESS:
        return None
    if init == "olora":
        Q, R = torch.linalg.qr(weight.float())
        return LowRank(R[:rank], Q[:, :rank])
    if init not in ("pissa", "kasa"):
        raise UsageError(
            f"an adapter initialised with {init!r} changed its base by random or data-dependent factors that are not "
            "in the file: convert it with peft's save_pretrained(path_initial_model_for_weight_conversion=...) first"
        )
    U, S, Vh = torch.linalg.svd(weight.double(), full_matrices=False)
    part = slice(None, rank) if init == "pissa" else slice(len(S) - rank, None)
    return LowRank(Vh[part].float(), (U[:, part] * S[part]).float())
