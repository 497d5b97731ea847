"""OFT (arXiv 2306.07280): the input is rotated block by block, W' = W R^T; dense, and needs the base.

``oft_R.weight`` holds the upper triangle of one skew-symmetric Q per block. R is Cayley's (I - Q)(I + Q)^-1, or
PEFT's truncated Neumann series of it, as the configuration says. COFT first shrinks Q to a ball.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"oft_R.weight"})


def delta_of(site: Site) -> Tensor:
    """oft_R.weight (blocks, b (b - 1) / 2), one row when the blocks share it."""
    config, entries = site.config, site["oft_R.weight"]
    Q = skew(entries)
    if config.get("coft"):
        Q = _into_ball(Q, config["eps"])
    terms = config.get("num_cayley_neumann_terms", 5) if config.get("use_cayley_neumann", True) else None
    R = cayley(Q, terms)
    return rotate(site.weight(), R) - site.weight()


def rotate(weight: Tensor, R: Tensor) -> Tensor:
    """The weight times blockdiag(R)^T: weight (d_out, d_in), R (d_in / b or 1, b, b)."""
    blocks = weight.unflatten(1, (-1, R.shape[-1]))
    return torch.einsum("onk,nck->onc", blocks, R.expand(blocks.shape[1], -1, -1)).flatten(1)


def skew(entries: Tensor) -> Tensor:
    """Skew-symmetric matrices (n, b, b) from their upper triangles (n, b (b - 1) / 2)."""
    size = int((1 + (1 + 8 * entries.shape[-1]) ** 0.5) / 2)
    rows, columns = torch.triu_indices(size, size, 1)
    Q = entries.new_zeros(len(entries), size, size)
    Q[:, rows, columns] = entries
    return Q - Q.mT


def cayley(Q: Tensor, terms: int | None) -> Tensor:
    """(I - Q)(I + Q)^-1 exactly (``terms`` None), or I + 2Q + 2Q^2 + ... + Q^(terms-1) as PEFT truncates it.

    The series belongs to Cayley's map of -Q; PEFT uses both with the same sign of Q, and so must we.
    """
    identity = torch.eye(Q.shape[-1], dtype=Q.dtype, device=Q.device)
    if terms is None:
        return torch.linalg.solve(identity + Q, identity - Q, left=False)
    R, power = identity.expand_as(Q).clone(), Q
    if terms == 2:
        return R + 2 * Q
    for order in range(1, terms):
        R = R + (power if order == terms - 1 else 2 * power)
        power = power @ Q
    return R


def _into_ball(Q: Tensor, eps: float) -> Tensor:
    radius = eps / len(Q) ** 0.5
    norm = Q.flatten(1).norm(dim=1)[:, None, None]
    return torch.where(norm <= radius, Q, radius * Q / norm)
