"""The leading eigenvectors of a symmetric float32 matrix on a CPU: torch has only all of them, for twice the time.

The routine is LAPACK's ssyevr in the library that SciPy carries. It is called by its address, since SciPy's own
function keeps the interpreter's lock and no other thread could work beside it; on as many threads as torch uses.
"""

from __future__ import annotations

import ctypes
import importlib
from collections.abc import Callable
from functools import cache
from threading import Lock
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

_MANY = 0.5  # share of all from which on all of them take no longer


class Leading(NamedTuple):
    """Eigenvalues (k,) ascending and eigenvectors (n, k), float32."""

    values: Tensor
    vectors: Tensor


def leading(gram: Tensor, count: int) -> Leading:
    """The ``count`` largest eigenvalues and their vectors.

    Args:
        gram: (n, n) float32, contiguous, on a CPU; read on and below the diagonal.
        count: from 1 to n.
    """
    n = gram.shape[-1]
    found = _some(gram.clone(), count) if count <= _MANY * n else None
    if found is None:
        w, V = torch.linalg.eigh(gram)
        return Leading(w[n - count :], V[:, n - count :])
    return found


def _some(gram: Tensor, count: int) -> Leading | None:
    """The same by bisection and inverse iteration; None where that does not converge."""
    n = gram.shape[-1]
    values, rows = torch.empty(n), torch.empty(count, n)
    support = torch.empty(2 * count, dtype=torch.int32)

    routine = _ssyevr()

    def call(work: Tensor, whole: Tensor, sizes: tuple[int, int]) -> int:
        numbers = [ctypes.c_int(x) for x in (n, n - count + 1, n, *sizes)]
        size, first, last, of_work, of_whole = (ctypes.byref(x) for x in numbers)
        unused, found, info = ctypes.byref(ctypes.c_float(0)), ctypes.c_int(0), ctypes.c_int(0)
        # Below the diagonal by rows is above it by columns.
        routine(
            b"V", b"I", b"U", size, gram.data_ptr(), size, unused, unused, first, last, unused, ctypes.byref(found),
            values.data_ptr(), rows.data_ptr(), size, support.data_ptr(), work.data_ptr(), of_work, whole.data_ptr(),
            of_whole, ctypes.byref(info),
        )  # fmt: skip
        return info.value

    work, whole = torch.empty(1), torch.empty(1, dtype=torch.int32)
    call(work, whole, (-1, -1))  # asks for the sizes
    work, whole = torch.empty(int(work)), torch.empty(int(whole), dtype=torch.int32)
    with _threads:
        failed = call(work, whole, (len(work), len(whole)))
    return None if failed else Leading(values[:count], rows.T)


@cache
def _lapack() -> ModuleType:
    return importlib.import_module("scipy.linalg.cython_lapack")  # here, because it takes a while to load


@cache
def _ssyevr() -> Callable[..., None]:
    capsule = _lapack().__pyx_capi__["ssyevr"]
    name = ctypes.pythonapi.PyCapsule_GetName
    name.restype, name.argtypes = ctypes.c_char_p, [ctypes.py_object]
    address = ctypes.pythonapi.PyCapsule_GetPointer
    address.restype, address.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    return ctypes.CFUNCTYPE(None, *[ctypes.c_void_p] * 21)(address(capsule, name(capsule)))


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
