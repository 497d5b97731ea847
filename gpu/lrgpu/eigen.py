"""Eigenvectors of a symmetric float32 matrix on a CPU: the leading ones, of which torch has only all, or all.

The routines are ssyevr and ssyevd of the LAPACK that SciPy carries. They are called by their addresses, since SciPy's
own functions keep the interpreter's lock and no other thread could work beside them; on as many threads as torch uses.
All vectors of 1024^2 and 4096^2 take 0.94 and 0.78 of torch's time (one AVX2 core), an eighth of them a half.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable, Sequence
from functools import cache
from threading import Lock
from types import ModuleType
from typing import Any, NamedTuple

import torch
from torch import Tensor

_MANY = 0.5  # share of all from which on all of them take no longer


class Eigen(NamedTuple):
    """Eigenvalues (k,) ascending and eigenvectors (n, k), float32."""

    values: Tensor
    vectors: Tensor


def leading(gram: Tensor, count: int) -> Eigen:
    """The ``count`` largest eigenvalues and their vectors.

    Args:
        gram: (n, n) float32, contiguous, on a CPU, finite; read on and below the diagonal.
        count: from 1 to n.
    """
    n = gram.shape[-1]
    if count <= _MANY * n:
        values, rows, support = torch.empty(n), torch.empty(count, n), torch.empty(2 * count, dtype=torch.int32)
        some = b"V", b"I", b"U", n, gram.clone(), n, 0.0, 0.0, n - count + 1, n, 0.0, 0, values, rows, n, support
        if _solved("ssyevr", some):
            return Eigen(values[:count], rows.T)
    values, vectors = every(gram)
    return Eigen(values[n - count :], vectors[:, n - count :])


def every(gram: Tensor) -> Eigen:
    """All eigenvalues and their vectors, of a matrix as for :func:`leading`."""
    n = gram.shape[-1]
    values, rows = torch.empty(n), gram.clone()
    if _solved("ssyevd", (b"V", b"U", n, rows, n, values), least=1 + 6 * n + 2 * n * n):
        return Eigen(values, rows.T)
    return Eigen(*torch.linalg.eigh(gram))


def _solved(name: str, given: Sequence[Any], least: int = 1) -> bool:
    """Whether a routine converged: ``given`` and after it its workspace, which it says the sizes of (float32 says large
    ones inexactly, hence ``least``). Rows are its columns, so what is below the diagonal here is above it there."""
    info, arguments = ctypes.c_int(0), [_passed(x) for x in given]
    routine = _routine(name, len(arguments) + 5)
    work, whole = torch.empty(1), torch.empty(1, dtype=torch.int32)

    def call(*sizes: int) -> None:
        of_work, of_whole = (ctypes.c_int(size) for size in sizes)
        workspace = work.data_ptr(), ctypes.byref(of_work), whole.data_ptr(), ctypes.byref(of_whole)
        routine(*arguments, *workspace, ctypes.byref(info))

    call(-1, -1)
    work, whole = torch.empty(max(int(work), least)), torch.empty(int(whole), dtype=torch.int32)
    with _threads:
        call(len(work), len(whole))
    return info.value == 0


def _passed(value: Any) -> Any:
    """By reference, as Fortran takes everything."""
    if isinstance(value, Tensor):
        return value.data_ptr()
    if isinstance(value, bytes):
        return value
    return ctypes.byref(ctypes.c_float(value) if isinstance(value, float) else ctypes.c_int(value))


@cache
def _lapack() -> ModuleType:
    return importlib.import_module("scipy.linalg.cython_lapack")  # here, because it takes a while to load


@cache
def _routine(name: str, arguments: int) -> Callable[..., None]:
    capsule = _lapack().__pyx_capi__[name]
    name_of = ctypes.pythonapi.PyCapsule_GetName
    name_of.restype, name_of.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * arguments)(address(capsule, name_of(capsule)))


class _Threads:
    """SciPy's OpenBLAS on as many threads as torch uses while calls run; after the last, on as many as before.

    A context for any number of threads at a time. Another LAPACK than OpenBLAS decides for itself.
    """

    def __init__(self) -> None:
        self.lock, self.calls, self.before = Lock(), 0, 0

    def __enter__(self) -> None:
        with self.lock:
            if not self.calls:
                self.before = self.count()
                self.set(torch.get_num_threads())
            self.calls += 1

    def __exit__(self, *_: object) -> None:
        with self.lock:
            self.calls -= 1
            if not self.calls:
                self.set(self.before)

    def count(self) -> int:
        """How many threads it uses; 0 if that is not known."""
        return getattr(self._library(), f"{self._prefix()}_get_num_threads")() if self._prefix() else 0

    def set(self, count: int) -> None:
        """Use so many."""
        if self._prefix():
            getattr(self._library(), f"{self._prefix()}_set_num_threads")(count)

    @staticmethod
    @cache
    def _library() -> ctypes.CDLL:
        return ctypes.CDLL(_lapack().__file__)

    @classmethod
    @cache
    def _prefix(cls) -> str | None:
        names = ("scipy_openblas", "openblas")
        return next((name for name in names if hasattr(cls._library(), f"{name}_set_num_threads")), None)


_threads = _Threads()
