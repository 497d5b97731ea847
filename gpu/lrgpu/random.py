"""Uniform random numbers by counter: number i of a stream is a function of (key, i) and of nothing else.

So a mask does not depend on the order of tensors, on batches, threads, devices or workers, and any part of it
can be drawn alone. The function is a Weyl sequence from one half of the key and three multiply-xorshift rounds with
the other half after the first, all in 32 bits: vector units multiply those, and 64 bits only one by one.
The upper 24 bits make a float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from hashlib import blake2b

import numpy
import torch

from lrgpu import backend
from lrgpu.backend import Array

_GAMMA, _FIRST, _SECOND, _THIRD = 0x9E3779B9, 0x7FEB352D, 0x846CA68B, 0x31848BAB
_UPPER = (1 << 24) - 1
_CPU_BLOCK = 1 << 15  # numbers: a block's buffers stay in the cache
_WEYL = numpy.arange(1, _CPU_BLOCK + 1, dtype=numpy.uint32) * numpy.uint32(_GAMMA)


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
    for part, words in _words(keys, result, start):
        part[...] = words >> 8 & _UPPER
    result *= 2.0**-24
    return result


def less(keys: Sequence[int], limit: float, count: int, like: Array, *, start: int = 0) -> Array:
    """Where the numbers are less than ``limit``, as 0 and 1: uint8, shape (len(keys), count).

    The same decisions as with the float32 numbers of :func:`uniform`, made on their integers: no floats are formed.
    """
    library = backend.of(like)
    result = library.empty((len(keys), count), library.xp.uint8, like)
    least = math.ceil(float(numpy.float32(limit)) * (1 << 24))  # the least integer that is not
    if not 0 < least <= _UPPER:
        result[...] = int(least > 0)
        return result
    for part, words in _words(keys, result, start):
        part[...] = (words >> 8 & _UPPER) < least if isinstance(words, torch.Tensor) else words < least << 8
    return result


def _words(keys: Sequence[int], result: Array, start: int) -> Iterator[tuple[Array, Array]]:
    """Parts of ``result`` (len(keys), count), each with the 32 random bits of its numbers.

    NumPy (on a CPU) and CuPy have unsigned integers. torch has signed ones: there bits that come from the sign in a
    shift are cleared.
    """
    library, count = backend.of(result), result.shape[1]
    if library.on_cpu(result):
        result, weyl = library.host(result), _WEYL
    else:
        weyl = library.put(torch.arange(1, count + 1, dtype=torch.int32), result) * _signed(_GAMMA)
        weyl = weyl if library.xp is torch else weyl.view("uint32")
    unsigned = not isinstance(weyl, torch.Tensor)
    number = _unsigned if unsigned else _signed

    def mix(z: Array, shift: int) -> None:
        upper = z >> shift
        if not unsigned:
            upper &= (1 << 32 - shift) - 1
        z ^= upper

    for row, key in enumerate(keys):
        first = 0
        while first < count:
            place = start + first
            # Counters beyond 2^32 go on in the stream of another upper half.
            size = min(len(weyl), count - first, (1 << 32) - place % (1 << 32))
            z = weyl[:size] + number(key + place * _GAMMA)
            mix(z, 16)
            z *= number(_FIRST)
            z += number((key >> 32) + (place >> 32) * _GAMMA)
            mix(z, 15)
            z *= number(_SECOND)
            mix(z, 15)
            z *= number(_THIRD)
            mix(z, 16)
            yield result[row, first : first + size], z
            first += size


def _unsigned(number: int) -> int:
    return number % (1 << 32)


def _signed(number: int) -> int:
    """``number`` modulo 2^32 as a signed 32-bit integer, in which products wrap around as without a sign."""
    return (number + (1 << 31)) % (1 << 32) - (1 << 31)
