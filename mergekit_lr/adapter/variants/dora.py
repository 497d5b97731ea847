"""DoRA (arXiv 2402.09353): the adapted weight's rows rescaled to learnt lengths; dense, and needs the base.

W' = diag(m / |W + D|) (W + D), the norm over each output row. The change W' - W is low-rank only where every
length is what it was, and then D itself. LyCORIS also has files that rescale input channels: a magnitude of
shape (1, channels) says so.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import wide
from mergekit_lr.errors import MismatchError


def rescaled(weight: Tensor, delta: LowRank | Tensor, magnitude: Tensor) -> LowRank | Tensor:
    """The change of ``weight`` (d_out, d_in) under ``delta`` and DoRA's ``magnitude``.

    Args:
        weight: The base's weight as a matrix; a convolution's flat, an embedding's transposed.
        delta: The change before rescaling, scaling included.
        magnitude: (d_out,) lengths of rows, or (1, channels) lengths of input channels.

    Returns:
        ``delta`` itself where no length changes, else the dense change (d_out, d_in) in float32.

    Raises:
        MismatchError: the magnitude has neither one entry per row nor one per input channel.
    """
    weight, target = wide(weight), wide(magnitude)
    adapted = weight + (delta.dense() if isinstance(delta, LowRank) else delta)
    ratio = _ratio(adapted, target)
    if torch.equal(ratio, torch.ones_like(ratio)):
        return delta
    return adapted * ratio - weight


def _ratio(adapted: Tensor, target: Tensor) -> Tensor:
    """What each entry of ``adapted`` is multiplied with, broadcastable; float64 sums of squares."""
    rows, columns = adapted.shape
    if target.ndim == 2 and target.shape[0] == 1 and rows != 1 and columns % target.shape[1] == 0:
        kernel = columns // target.shape[1]
        length = adapted.double().view(rows, -1, kernel).square().sum((0, 2)).sqrt()
        return (target.flatten().double() / length).to(adapted.dtype).repeat_interleave(kernel)[None, :]
    if target.numel() != rows:
        raise MismatchError(
            f"a DoRA magnitude of shape {list(target.shape)} does not fit a weight matrix of shape {[rows, columns]}"
        )
    length = adapted.double().square().sum(1).sqrt()
    return (target.flatten().double() / length).to(adapted.dtype)[:, None]
