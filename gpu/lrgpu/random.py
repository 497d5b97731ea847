"""Uniform random numbers by counter: number i of a stream is a function of (key, i) and of nothing else.

So a mask does not depend on the order of tensors, on batches, threads, devices or workers, and any part of it
can be drawn alone. The function is a Weyl sequence from one half of the key and three multiply-xorshift rounds with
the other half after the first, all in 32 bits: vector units multiply those, and 64 bits only one by one.
The upper 24 bits make a float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch

from lrgpu import backend
from lrgpu.backend import Array

_GAMMA, _FIRST, _SECOND, _THIRD = 0x9E3779B9, 0x7FEB352D, 0x846CA68B, 0x31848BAB
_CPU_BLOCK = 1 << 16  # numbers: three int32 buffers stay in the cache


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
    weyl = library.put(torch.arange(1, block + 1, dtype=torch.int32), like) * _signed(_GAMMA)
    for row, key in enumerate(keys):
        for first in range(0, count, block):
            place = start + first
            # Counters beyond 2^32 go on in the stream of another upper half.
            z = weyl[: count - first] + _signed(key + place * _GAMMA)
            z ^= z >> 16 & (1 << 16) - 1
            z *= _signed(_FIRST)
            z += _signed((key >> 32) + (place >> 32) * _GAMMA)
            z ^= z >> 15 & (1 << 17) - 1
            z *= _signed(_SECOND)
            z ^= z >> 15 & (1 << 17) - 1
            z *= _signed(_THIRD)
            z ^= z >> 16 & (1 << 16) - 1
            result[row, first : first + block] = z >> 8 & (1 << 24) - 1
    result *= 2.0**-24
    return result


def _signed(number: int) -> int:
    """``number`` modulo 2^32 as a signed 32-bit integer, in which both libraries' products wrap around."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
