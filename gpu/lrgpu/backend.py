"""Which library an array belongs to, and the few places where torch and CuPy differ.

The mathematics of this package is written once, with the operations that both libraries spell alike
(``@``, ``swapaxes``, ``xp.where``, ``xp.linalg.eigh``, ``out[...] = x``). What they spell differently is in
the table below. CuPy is looked up only when an array of it appears, and never imported on its own account.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, TypeAlias

import torch

Array: TypeAlias = Any  # a torch.Tensor or a cupy.ndarray


@dataclass(frozen=True)
class Backend:
    """One array library.

    xp: the module itself. cast(x, dtype) copies only if it must. empty(shape, dtype, like) and
    put(tensor, like) make arrays on the device of ``like``. host(x) is ``x`` as a NumPy array, of a CPU tensor the
    same memory. on_cpu(x) and contiguous(x) say where and how ``x`` lies.
    """

    xp: ModuleType
    cast: Callable[[Array, Any], Array]
    empty: Callable[[tuple[int, ...], Any, Array], Array]
    put: Callable[[torch.Tensor, Array], Array]
    host: Callable[[Array], Any]
    on_cpu: Callable[[Array], bool]
    contiguous: Callable[[Array], bool]


def of(array: Array) -> Backend:
    """The backend of ``array``.

    Raises:
        TypeError: neither a torch tensor nor a CuPy array.
    """
    if isinstance(array, torch.Tensor):
        return _TORCH
    if type(array).__module__.partition(".")[0] == "cupy":
        return _cupy(sys.modules["cupy"])
    raise TypeError(f"expected a torch tensor or a CuPy array, got {type(array).__name__}")


def normal(seeds: Sequence[int], rows: int, columns: int, like: Array, dtype: Any) -> Array:
    """Standard normal numbers, shape (len(seeds), rows, columns): slice i depends on seeds[i] alone.

    They are drawn on the CPU, so that every device and every batch sees the same numbers.
    """
    draws = [torch.randn(rows, columns, generator=torch.Generator().manual_seed(seed)) for seed in seeds]
    backend = of(like)
    return backend.cast(backend.put(torch.stack(draws), like), dtype)


def squared_norm(matrix: Array) -> Array:
    """Sum of squares over the last two axes, shape (...), float64, without a float64 copy of the whole."""
    backend = of(matrix)
    rows = matrix.shape[-2]
    step = max(1, 131072 // max(1, matrix.shape[-1])) if backend.on_cpu(matrix) else max(1, rows)
    total = backend.empty(tuple(matrix.shape[:-2]), backend.xp.float64, matrix)
    total[...] = 0
    for start in range(0, rows, step):
        block = backend.cast(matrix[..., start : start + step, :], backend.xp.float64)
        total += (block * block).sum(-1).sum(-1)
    return total


_TORCH = Backend(
    xp=torch,
    cast=lambda x, dtype: x.to(dtype),
    empty=lambda shape, dtype, like: torch.empty(shape, dtype=dtype, device=like.device),
    put=lambda tensor, like: tensor.to(like.device),
    host=lambda x: x.cpu().numpy(),
    on_cpu=lambda x: x.device.type == "cpu",
    contiguous=lambda x: x.is_contiguous(),
)


def _cupy(cupy: ModuleType) -> Backend:
    return Backend(
        xp=cupy,
        cast=lambda x, dtype: x.astype(dtype, copy=False),
        empty=lambda shape, dtype, like: cupy.empty(shape, dtype=dtype),
        put=lambda tensor, like: cupy.asarray(tensor.numpy()),
        host=cupy.asnumpy,
        on_cpu=lambda x: False,
        contiguous=lambda x: x.flags.c_contiguous,
    )
