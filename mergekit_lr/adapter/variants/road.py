"""RoAd (arXiv 2409.00119): 2-D rotations and scalings of pairs of outputs, W' = R W; dense, needs the base.

Outputs i and i + g/2 of each group of g form a pair. The bias is rotated along.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"road_theta", "road_alpha"})


def delta_of(site: Site) -> Tensor:
    """road_theta, road_alpha: (d_out / 2,), (d_out,) or (2 d_out,) in road_1, road_2, road_4."""
    weight = site.weight()
    return _rotate(site, weight) - weight


def bias_delta_of(site: Site) -> Tensor | None:
    """The change of the bias (d_out,), None where there is none."""
    bias = site.bias()
    return None if bias is None else _rotate(site, bias) - bias


def _rotate(site: Site, x: Tensor) -> Tensor:
    """x (d_out, ...): x * cos-part + (-x_2, x_1) * sin-part within each group."""
    half = site.config["group_size"] // 2
    along, across = _columns(site, half)
    first, second = x.unflatten(0, (-1, 2, half)).unbind(1)
    turned = torch.stack((-second, first), dim=1).reshape(x.shape)
    tail = (-1,) + (1,) * (x.ndim - 1)
    return x * along.view(tail) + turned * across.view(tail)


def _columns(site: Site, half: int) -> tuple[Tensor, Tensor]:
    theta, alpha, variant = site["road_theta"], site["road_alpha"], site.config["variant"]
    match variant:
        case "road_1":
            theta, alpha = (t.view(-1, half).repeat_interleave(2, dim=0).flatten() for t in (theta, alpha))
            return alpha * theta.cos(), alpha * theta.sin()
        case "road_2":
            return alpha * theta.cos(), alpha * theta.sin()
        case "road_4":
            theta, alpha = theta.view(-1, 2, 2 * half), alpha.view(-1, 2, 2 * half)
            along, across = alpha[:, 0] * theta[:, 0].cos(), alpha[:, 1] * theta[:, 1].sin()
            return along.flatten(), across.flatten()
        case _:
            raise FormatError(f"{site.module}: unknown RoAd variant {variant}, expected road_1, road_2 or road_4")
