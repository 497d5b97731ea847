"""IA3 (arXiv 2205.05638): a learnt factor per output feature, or per input feature in feed-forward modules.

Multiplicative and of full rank: the delta is dense and needs the base. An output factor scales the bias too.
"""

from __future__ import annotations

import re

from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"ia3_l"})


def delta_of(site: Site) -> Tensor:
    """ia3_l (d_out, 1), or (1, d_in) in feed-forward modules; (1, channels, 1, 1) in convolutions."""
    factor, weight = _factor(site), site.weight()
    if not _on_input(site):
        return weight * (factor[:, None] - 1)
    per_feature = site.shape[1] // len(factor)  # a convolution scales each input channel's whole kernel
    return weight * (factor.repeat_interleave(per_feature)[None, :] - 1)


def bias_delta_of(site: Site) -> Tensor | None:
    """The change of the bias (d_out,), None where there is no bias or the input is scaled."""
    bias = site.bias()
    return None if bias is None or _on_input(site) else bias * (_factor(site) - 1)


def _factor(site: Site) -> Tensor:
    return site["ia3_l"].flatten()


def _on_input(site: Site) -> bool:
    """Whether the module counts as feed-forward: by name, as PEFT decides."""
    names = site.config.get("feedforward_modules") or []
    if isinstance(names, str):
        return re.fullmatch(names, site.module) is not None
    return any(site.module == name or site.module.endswith(f".{name}") for name in names)
