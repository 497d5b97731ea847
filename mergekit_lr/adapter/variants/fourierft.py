"""FourierFT (arXiv 2405.03003): the real part of an inverse 2-D Fourier transform of a few coefficients.

Where the coefficients lie is drawn from ``random_loc_seed``, the same for every module of one shape.
"""

from __future__ import annotations

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"fourierft_spectrum"})


def delta_of(site: Site) -> Tensor:
    """fourierft_spectrum (n,) -> (d_out, d_in), dense."""
    spectrum = scatter(site["fourierft_spectrum"], site.shape, site.config["random_loc_seed"])
    return torch.fft.ifft2(spectrum).real * site.config["scaling"]


def scatter(values: Tensor, shape: tuple[int, int], seed: int) -> Tensor:
    """``values`` at the places that PEFT draws from ``seed``, zero elsewhere."""
    d_out, d_in = shape
    places = torch.randperm(d_out * d_in, generator=torch.Generator().manual_seed(seed))[: len(values)]
    return values.new_zeros(d_out * d_in).index_put_((places,), values).view(shape)
