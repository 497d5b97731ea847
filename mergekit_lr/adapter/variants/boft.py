"""BOFT (arXiv 2311.06243): a product of sparse rotations of the input and a factor per output row.

W' = diag(s) W R^T with R = P_m^T.. a butterfly of block-diagonal rotations between permutations. Dense, and
needs the base. The file's ``boft_R`` says how many rotations there are; PEFT runs one without its CUDA
extension whatever the configuration says, so the tensor is trusted.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.oft import cayley, rotate
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"boft_R", "boft_s"})


def delta_of(site: Site) -> Tensor:
    """boft_R (factors, blocks, b, b) of any entries, its skew part counts; boft_s (d_out, 1) or (1, d_out)."""
    weight, factors = site.weight(), site["boft_R"]
    count, blocks, size, _ = factors.shape
    changed = weight
    for index, factor in enumerate(factors):
        R = cayley((factor - factor.mT) / 2, None)
        order = butterfly(site.shape[1], blocks // 2**index, size // 2) if count > 1 else None
        changed = _rotate_in_order(changed, R, order)
    return changed * site["boft_s"].reshape(-1, 1) - weight


def _rotate_in_order(weight: Tensor, R: Tensor, order: Tensor | None) -> Tensor:
    """Rotate the columns as permuted by ``order`` and put them back: W P R^T P^T."""
    if order is None:
        return rotate(weight, R)
    place = torch.empty_like(order).scatter_(0, order, torch.arange(len(order)))
    return rotate(weight[:, place], R)[:, order]


def butterfly(width: int, blocks: int, size: int) -> Tensor:
    """The butterfly's order of ``width`` columns: in each of ``blocks`` blocks, runs of ``size``, even ones first."""
    runs = torch.arange(width).view(blocks, -1, size)
    return torch.cat((runs[:, 0::2], runs[:, 1::2]), dim=1).flatten()
