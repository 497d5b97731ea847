"""One safetensors file: its header, checked against the file, and its tensors, mapped one at a time.

The header is the format's whole risk, so it is read and checked here in full before anything else is: every
dtype and shape known, every byte range matching its shape, ranges that tile the data without hole or overlap,
and a file exactly as long as its header says. A tensor is mapped on its own when it is read and unmapped when
the last reference to it goes, so neither resident nor virtual memory grows with the file.

Format: https://github.com/huggingface/safetensors (8 bytes of header length, JSON header, data).
"""

from __future__ import annotations

import errno
import json
import math
import mmap
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy
import torch
from torch import Tensor

from mergekit_lr.errors import FormatError

DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F8_E8M0": torch.float8_e8m0fnu,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U64": torch.uint64,
    "U32": torch.uint32,
    "U16": torch.uint16,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPE_NAMES = {dtype: name for name, dtype in DTYPES.items()}

MAX_HEADER = 100_000_000  # bytes; the limit of the reference implementation
_POPULATE_READ = 22  # MADV_POPULATE_READ (Linux 5.14): fault pages in without breaking copy-on-write


class TensorInfo(NamedTuple):
    """Where one tensor lies: ``offset`` counts bytes from the start of ``file``."""

    dtype: torch.dtype
    shape: tuple[int, ...]
    file: Path
    offset: int
    nbytes: int


def read_header(path: Path) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and string metadata of the file at ``path``, every claim checked against the file itself.

    Raises:
        FormatError: the file is no safetensors file, is truncated, or its header contradicts it.
    """
    try:
        size = path.stat().st_size
        with path.open("rb") as file:
            length = header_length(path, file.read(8), size)
            return parse_header(path, file.read(length), size)
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror})") from None


def header_length(path: Path, first: bytes, size: int) -> int:
    """Bytes of the header that begins behind the ``first`` 8 of a file of ``size`` bytes.

    Raises:
        FormatError: these are no 8 bytes, or no length that the file has room for.
    """
    length = int.from_bytes(first, "little")
    if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
        header = f" and a header of {length}" if size >= 8 else ""
        problem = f"has {size} bytes{header}, so it is no whole safetensors file" if size else "is empty"
        raise FormatError(f"{path}: {problem}; download or save it again")
    return length


def parse_header(path: Path, raw: bytes, size: int) -> tuple[dict[str, TensorInfo], dict[str, str]]:
    """Tensors and metadata of a header, its JSON in ``raw``, checked against a file of ``size`` bytes at ``path``.

    Raises:
        FormatError: the header is damaged or contradicts the file.
    """
    try:
        header = json.loads(raw, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:
        raise FormatError(f"{path}: the header is not valid JSON ({error}); the file is damaged") from None
    if not isinstance(header, dict):
        raise FormatError(f"{path}: the header is not a table of tensors; the file is damaged")
    metadata = header.pop("__metadata__", None) or {}
    if not isinstance(metadata, dict):
        raise FormatError(f"{path}: __metadata__ is not a table of strings")
    start = 8 + len(raw)
    tensors = {name: _entry(path, name, entry, start) for name, entry in header.items()}
    end = start
    for name, info in sorted(tensors.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if info.offset != end:
            raise FormatError(f"{path}: tensor {name} starts at byte {info.offset}, expected {end}; damaged header")
        end += info.nbytes
    if end != size:
        problem = "is truncated" if end > size else "has bytes that no tensor owns"
        raise FormatError(f"{path}: {problem}: the header accounts for {end} bytes, the file has {size}")
    return tensors, {str(key): str(value) for key, value in metadata.items()}


def read_tensor(info: TensorInfo, index: int | None = None) -> Tensor:
    """The tensor (or entry ``index`` of its first axis) as a view of the file: copy-on-write, unmapped when dropped.

    Raises:
        FormatError: the file changed since its header was read.
    """
    shape = info.shape if index is None else info.shape[1:]
    size = math.prod(shape)
    start = size * (index or 0)
    return _copy_on_write(info, start, start + size).view(shape)


def parts(info: TensorInfo) -> Callable[[int, int], Tensor]:
    """What gives elements [start, stop) of the tensor, counted flat: (stop - start,). Never write into them.

    They are views of memory that cannot be written, so that the kernel reserves none for copies, however large the
    tensor is. It is mapped once: faster than to copy each part.

    Raises:
        FormatError: the file changed since its header was read.
    """
    size = math.prod(info.shape)
    if info.offset % info.dtype.itemsize or not size:
        return lambda start, stop: _copy_on_write(info, start, stop)
    window, skip = _window(info, 0, size, mmap.ACCESS_READ)
    # torch warns of a buffer that cannot be written: it is told nothing of that.
    mapped = numpy.asarray(_Bytes(numpy.frombuffer(window, numpy.uint8, info.nbytes, skip)))
    flat = torch.from_numpy(mapped).view(info.dtype)
    return lambda start, stop: flat[start:stop]


class _Bytes:
    """An array of bytes for NumPy, which takes it for one that can be written."""

    def __init__(self, array: numpy.ndarray):
        self._array = array  # keeps the memory
        self.__array_interface__ = array.__array_interface__ | {"data": (array.ctypes.data, False)}


def _copy_on_write(info: TensorInfo, start: int, stop: int) -> Tensor:
    """Elements [start, stop) of the tensor, counted flat."""
    if start == stop:
        return torch.empty(0, dtype=info.dtype)
    window, skip = _window(info, start, stop, mmap.ACCESS_COPY)
    if skip % info.dtype.itemsize:  # an unaligned tensor: legal in the format, not in arithmetic
        return torch.frombuffer(bytearray(window[skip:]), dtype=info.dtype)
    return torch.frombuffer(window, dtype=info.dtype, offset=skip)


def _window(info: TensorInfo, start: int, stop: int, access: int) -> tuple[mmap.mmap, int]:
    """The part of the file that holds elements [start, stop), and at which of its bytes they begin."""
    offset, nbytes = info.offset + start * info.dtype.itemsize, (stop - start) * info.dtype.itemsize
    skip = offset % mmap.ALLOCATIONGRANULARITY
    with info.file.open("rb") as file:
        if os.fstat(file.fileno()).st_size < offset + nbytes:
            raise FormatError(f"{info.file}: the file became shorter while it was being read")
        return mmap.mmap(file.fileno(), skip + nbytes, access=access, offset=offset - skip), skip


def announce(info: TensorInfo) -> None:
    """Have the kernel read the tensor ahead, where it can be asked to."""
    if hasattr(os, "posix_fadvise"):
        file = os.open(info.file, os.O_RDONLY)
        try:
            os.posix_fadvise(file, info.offset, info.nbytes, os.POSIX_FADV_WILLNEED)
        finally:
            os.close(file)


def prefault(tensor: Tensor) -> None:
    """Bring the pages behind a mapped ``tensor`` into memory now, in one system call where the kernel can."""
    advise = _madvise()
    if advise is None or tensor.device.type != "cpu" or tensor.numel() == 0:
        return
    page = mmap.PAGESIZE
    start = tensor.data_ptr() // page * page
    advise(start, tensor.data_ptr() + tensor.nbytes - start, _POPULATE_READ)


def _madvise():
    """The C library's ``madvise`` as (address, length, advice) -> status, or None where there is none."""
    global _libc
    if _libc is None and os.name == "posix":
        import ctypes

        _libc = ctypes.CDLL(None, use_errno=True).madvise
        _libc.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return _libc


_libc: Any = None


def _no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    table = dict(pairs)
    if len(table) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"{next(n for n in names if names.count(n) > 1)!r} appears twice")
    return table


def _entry(path: Path, name: str, entry: Any, start: int) -> TensorInfo:
    try:
        dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        whole = type(dtype) is str and all(type(n) is int and n >= 0 for n in (*shape, begin, end))
    except (TypeError, KeyError, ValueError):
        whole = False
        dtype, shape, begin, end = None, (), 0, 0
    if not whole:
        raise FormatError(f"{path}: the header's entry for tensor {name} is damaged")
    if dtype not in DTYPES:
        raise FormatError(f"{path}: tensor {name} has dtype {dtype}, which is not supported")
    nbytes = math.prod(shape) * DTYPES[dtype].itemsize
    if end - begin != nbytes:
        raise FormatError(
            f"{path}: tensor {name} of shape {list(shape)} and dtype {dtype} needs {nbytes} bytes, the header gives "
            f"it {end - begin}"
        )
    return TensorInfo(DTYPES[dtype], shape, path, start + begin, nbytes)


def is_out_of_space(error: OSError) -> bool:
    """Whether writing failed because the disk or the quota is full."""
    return error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
