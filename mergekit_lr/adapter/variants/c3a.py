"""C3A (arXiv 2407.19342): a matrix of circulant blocks over the input size, dense.

Block (i, j) is the circulant matrix whose first row is ``c3a_kernel[i, j]``.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"c3a_kernel"})


def delta_of(site: Site) -> Tensor:
    """c3a_kernel (d_out / b, d_in / b, b) -> (d_out, d_in)."""
    kernel = site["c3a_kernel"]
    rows, columns, size = kernel.shape
    places = torch.arange(size)
    shift = (places[None, :] - places[:, None]) % size
    blocks = kernel[..., shift]  # (rows, columns, b, b)
    return blocks.transpose(1, 2).reshape(rows * size, columns * size) / site.shape[1]
