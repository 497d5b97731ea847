"""Supertuning: a sparse change of the base's largest (or smallest) weights, with an optional LoRA beside it."""

from __future__ import annotations

from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset(
    {"supertuning_values", "supertuning_indices", "supertuning_lora_A.weight", "supertuning_lora_B.weight"}
)


def delta_of(site: Site) -> Tensor:
    """supertuning_values (n,) at flat supertuning_indices (n,), plus the low-rank part where there is one."""
    values, places = site["supertuning_values"], places_of(site, len(site["supertuning_values"]))
    delta = values.new_zeros(site.shape).flatten().index_put_((places,), values, accumulate=True)
    delta = delta.view(site.shape)
    if "supertuning_lora_A.weight" in site.tensors:
        A, B = site["supertuning_lora_A.weight"], site["supertuning_lora_B.weight"]
        delta += LowRank(A, B, site.config["lora_alpha"] / site.config["r"]).dense()
    return delta


def places_of(site: Site, count: int) -> Tensor:
    """The flat places, from the file, or found again as the base's extreme weights."""
    if "supertuning_indices" in site.tensors:
        return site["supertuning_indices"].long()
    return site.weight().abs().flatten().topk(count, largest=site.config["select_top"]).indices
