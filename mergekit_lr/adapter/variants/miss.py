"""MiSS (arXiv 2409.15371, once Bone): one small block repeated along the input, exactly low-rank.

delta[:, j] = block[j mod r]: that is B A with B = block^T and A a row of identities. In ``mini`` a narrower
block is repeated along the output as well. ``bat`` multiplies instead, W_ij M_i + M_i on r x r tiles, which
is dense and needs the base.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"miss_block", "bone_block"})


def delta_of(site: Site) -> LowRank | Tensor:
    """miss_block (r, d_out), (r, mini_r) in mini, (d_out / r, r, r) in bat."""
    block = site["bone_block" if "bone_block" in site.tensors else "miss_block"]
    if block.ndim == 3:
        return _bat(site.weight(), block)
    d_out, d_in = site.shape
    rank, width = block.shape
    identities = torch.eye(rank, dtype=block.dtype).repeat(1, -(-d_in // rank))[:, :d_in]
    return LowRank(identities, block.repeat(1, d_out // width).T.contiguous())


def _bat(weight: Tensor, block: Tensor) -> Tensor:
    """Tile (i, j) of the weight becomes W_ij + W_ij M_i + M_i; the change is returned."""
    size = block.shape[-1]
    tiles = weight.unflatten(0, (-1, size)).unflatten(2, (-1, size)).permute(2, 0, 1, 3)
    return (tiles @ block + block).permute(1, 2, 0, 3).reshape(weight.shape)
