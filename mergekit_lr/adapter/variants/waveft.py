"""WaveFT: an inverse 2-D wavelet transform of a few coefficients, dense.

The coefficients' places are drawn from ``random_loc_seed`` inside the matrix, which sits in the middle of a
slightly larger, even-sided plane of four sub-bands; the transform's edges are cut off.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.fourierft import scatter
from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError, UsageError

TENSORS = frozenset({"waveft_spectrum"})


def delta_of(site: Site) -> Tensor:
    """waveft_spectrum (n,) -> (d_out, d_in)."""
    config = site.config
    plane = scatter(site["waveft_spectrum"], site.shape, config["random_loc_seed"])
    if not config.get("use_idwt", True):
        return plane * config["scaling"]
    low, high = _filters(config["wavelet_family"])
    overhang = len(low) - 2
    sides = [size + overhang + (size + overhang) % 2 for size in site.shape]
    padded = plane.new_zeros(sides)
    middle = tuple(_middle(side, size) for side, size in zip(sides, site.shape, strict=True))
    padded[middle] = plane
    rows, columns = (_synthesis(side, low, high) for side in sides)
    image = rows @ _swap_details(padded) @ columns.T
    crop = tuple(_middle(side, size) for side, size in zip(image.shape, site.shape, strict=True))
    return image[crop] * config["scaling"]


def _swap_details(plane: Tensor) -> Tensor:
    """The plane with its two mixed sub-bands exchanged: PEFT reads the upper right one as low in columns."""
    above, below = plane.tensor_split(2, dim=0)
    (low, right), (left, high) = above.tensor_split(2, dim=1), below.tensor_split(2, dim=1)
    return torch.cat((torch.cat((low, left), dim=1), torch.cat((right, high), dim=1)))


def _middle(side: int, size: int) -> slice:
    start = (side - size) // 2
    return slice(start, start + size)


def _synthesis(side: int, low: Tensor, high: Tensor) -> Tensor:
    """The one-dimensional inverse transform as a matrix (side - len + 2, side): low half first, then high."""
    length, half = len(low), side // 2
    matrix = low.new_zeros(2 * half + length - 2, side)
    for k in range(half):
        matrix[2 * k : 2 * k + length, k] = low
        matrix[2 * k : 2 * k + length, half + k] = high
    cut = (2 * length - 3) // 2
    return matrix[cut : len(matrix) - cut] if cut else matrix


def _filters(family: str) -> tuple[Tensor, Tensor]:
    """Synthesis filters: Haar's are known, the tables of the other families come from PEFT."""
    if family == "db1":
        root = 0.5**0.5
        return torch.tensor([root, root]), torch.tensor([root, -root])
    if find_spec("peft") is None:
        raise UsageError(f"a WaveFT adapter of wavelet family {family} needs the filters in peft: pip install peft")
    from peft.tuners.waveft.wavelet import Wavelet, wavelist

    if family not in wavelist():
        raise FormatError(f"a WaveFT adapter of wavelet family {family}, which peft does not know")
    wavelet = Wavelet(family)
    return torch.tensor(wavelet.rec_lo), torch.tensor(wavelet.rec_hi)
