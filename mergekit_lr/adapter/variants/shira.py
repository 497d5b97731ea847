"""SHiRA (arXiv 2406.13175): a sparse change at fixed places, dense here."""

from __future__ import annotations

from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"shira_weight", "shira_indices"})


def delta_of(site: Site) -> Tensor:
    """shira_weight (n,) at shira_indices (2, n): rows and columns of the matrix (d_out, d_in)."""
    values, (rows, columns) = site["shira_weight"], site["shira_indices"].long()
    return values.new_zeros(site.shape).index_put_((rows, columns), values, accumulate=True)
