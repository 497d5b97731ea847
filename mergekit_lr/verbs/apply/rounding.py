"""The one rounding of a result: to the nearest value, or up or down at random so that the mean is exact.

Nearest rounding loses a change that is small beside its weight: every entry falls back to where it was. Stochastic
rounding takes the value above or below with a probability that makes the expectation the exact number, so a small
change survives on average (Gupta et al., arXiv 1502.02551). Its random bits come from the counter-based generator
Philox (Salmon et al., 2011), keyed by seed and tensor name, with the place in the tensor as counter: they do not
depend on how the work was cut, in which order it ran, or whether it was resumed.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

RANDOM_BITS = {torch.bfloat16: 16, torch.float16: 13}  # of float32's mantissa, that the narrow dtype lacks
_PER_COUNT = 16  # 16-bit words in one step of Philox4x64's counter


def rounded(exact: Tensor, dtype: torch.dtype, *, seed: int | None, name: str, start: int) -> Tensor:
    """``exact`` (float32 or float64) in ``dtype``.

    Args:
        exact: any shape. dtype: of the result. seed: None rounds to nearest; a number rounds bfloat16 and float16
            stochastically (to wider dtypes nothing is rounded at random).
        name: of the tensor that ``exact`` is a part of. start: number of its first entry in that tensor, counted flat.
    """
    if seed is None or dtype not in RANDOM_BITS:
        return exact.to(dtype)
    bits = random_bits(seed, name, start, exact.numel()).to(exact.device).reshape(exact.shape)
    lost = 16 - RANDOM_BITS[dtype]
    mask = -(1 << RANDOM_BITS[dtype])
    values = exact.float()
    up = ((values.contiguous().view(torch.int32) + (bits >> lost)) & mask).view(torch.float32)
    if dtype is torch.float16:  # below 2^-14 its values stand 2^-24 apart
        tiny = torch.floor(values * 2.0**24 + bits * 2.0**-16) * 2.0**-24
        up = torch.where(values.abs() < 2.0**-14, tiny, up)
    return torch.where(values.isfinite(), up, values).to(dtype)


def random_bits(seed: int, name: str, start: int, count: int) -> Tensor:
    """Entries ``start`` to ``start + count`` of the tensor's own stream of 16 random bits each, int32."""
    digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
    key = np.frombuffer(digest[:16], dtype=np.uint64)
    first = start // _PER_COUNT
    generator = np.random.Philox(key=key, counter=np.array([first, 0, 0, 0], dtype=np.uint64))
    skip = start - first * _PER_COUNT
    words = generator.random_raw(-(-(skip + count) // 4)).view(np.uint16)
    return torch.from_numpy(words[skip : skip + count].astype(np.int32))
