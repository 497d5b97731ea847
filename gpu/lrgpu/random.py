"""Uniform random numbers by counter: number i of a stream is a function of (key, i) and of nothing else.

So a mask does not depend on the order of tensors, on batches, threads, devices or workers, and any part of it
can be drawn alone. The function is SplitMix64 (Steele, Lea and Flood, 2014): a Weyl sequence from the key, then
two multiply-xorshift rounds; the upper 24 bits make a float32. As fast as a sequential generator.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

from lrgpu import backend
from lrgpu.backend import Array

_GAMMA, _FIRST, _SECOND = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
_CPU_BLOCK = 1 << 15  # numbers: two int64 buffers stay in the cache


def stream(*names: object) -> int:
    """The key of the stream with these names, e.g. (seed, tensor, model): 64 bits of a hash of their text."""
    text = "\0".join(str(name) for name in names)
    return int.from_bytes(blake2b(text.encode(), digest_size=8).digest(), "little")


def uniform(keys: Sequence[int], count: int, like: Array, *, start: int = 0) -> Array:
    """Numbers ``start`` ... ``start + count - 1`` of each stream: float32 in [0, 1), shape (len(keys), count).

    Args:
        keys: one for each row, as from :func:`stream`.
        count: how many of each.
        like: an array of the library and device that the result is for.
        start: the first number's place in its stream.
    """
    library = backend.of(like)
    result = library.empty((len(keys), count), library.xp.float32, like)
    block = min(max(count, 1), _CPU_BLOCK) if library.on_cpu(like) else max(count, 1)
    weyl = library.put(torch.arange(block), like) * _signed(_GAMMA)
    for row, key in enumerate(keys):
        for first in range(0, count, block):
            z = weyl[: count - first] + _signed(key + (start + first + 1) * _GAMMA)
            z ^= z >> 30 & (1 << 34) - 1
            z *= _signed(_FIRST)
            z ^= z >> 27 & (1 << 37) - 1
            z *= _signed(_SECOND)
            # The last xorshift, by 31, does not reach the bits that are kept.
            z ^= z >> 31 & (1 << 33) - 1
            result[row, first : first + block] = z >> 40 & (1 << 24) - 1
    result *= 2.0**-24
    return result


def _signed(number: int) -> int:
    """``number`` modulo 2^64 as a signed 64-bit integer, in which both libraries' products wrap around."""
    return (number + (1 << 63)) % (1 << 64) - (1 << 63)
