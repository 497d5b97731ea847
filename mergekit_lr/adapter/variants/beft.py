"""BEFT: a bias added to the module's own; no weight changes."""

from __future__ import annotations

from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"beft_bias"})


def delta_of(site: Site) -> None:
    """Nothing: the weight stays."""


def bias_delta_of(site: Site) -> Tensor:
    """beft_bias (1, d_out) -> (d_out,)."""
    return site["beft_bias"].flatten()
