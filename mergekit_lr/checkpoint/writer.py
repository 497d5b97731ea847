"""Writing safetensors header first: shapes and dtypes are known beforehand, bytes follow in any order.

No shard is ever held in memory: ``create`` lays out the file, ``write`` puts one tensor at its place.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from types import TracebackType

import torch
from torch import Tensor

from mergekit_lr.checkpoint.safetensors import DTYPE_NAMES, TensorInfo, is_out_of_space
from mergekit_lr.errors import CapacityError


class SafetensorsWriter:
    """One safetensors file whose header is complete before its first tensor comes.

    Args:
        path: the file; an existing one is replaced.
        tensors: name to (dtype, shape), in the order of the file.
        metadata: string metadata; ``format: pt`` is added, which transformers expects.

    Raises:
        CapacityError: the disk is full.
    """

    def __init__(
        self,
        path: Path,
        tensors: Mapping[str, tuple[torch.dtype, tuple[int, ...]]],
        *,
        metadata: Mapping[str, str] | None = None,
    ):
        self.path = path
        self.tensors: dict[str, TensorInfo] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
        position = 0
        # Wide dtypes first keeps every tensor aligned to its own size.
        for name in sorted(tensors, key=lambda name: -tensors[name][0].itemsize):
            dtype, shape = tensors[name]
            nbytes = math.prod(shape) * dtype.itemsize
            header[name] = {
                "dtype": DTYPE_NAMES[dtype],
                "shape": list(shape),
                "data_offsets": [position, position + nbytes],
            }
            self.tensors[name] = TensorInfo(dtype, shape, path, position, nbytes)
            position += nbytes
        text = json.dumps(header, separators=(",", ":")).encode()
        text += b" " * (-len(text) % 8)
        start = 8 + len(text)
        self.tensors = {name: info._replace(offset=start + info.offset) for name, info in self.tensors.items()}
        self._file = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)
        self._put(len(text).to_bytes(8, "little") + text, 0)
        os.truncate(self._file, start + position)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put ``tensor`` at its place, rounded once to the dtype that the header promises.

        Raises:
            ValueError: the shape is not the promised one.
            CapacityError: the disk is full.
        """
        info = self.tensors[name]
        if tuple(tensor.shape) != info.shape:
            raise ValueError(f"{name} has shape {tuple(tensor.shape)}, the header promises {info.shape}")
        if info.nbytes:
            data = tensor.detach().to(device="cpu", dtype=info.dtype).contiguous()
            self._put(data.reshape(-1).view(torch.uint8).numpy(), info.offset)

    def close(self) -> None:
        """Flush to the disk and close."""
        os.fsync(self._file)
        os.close(self._file)

    def __enter__(self) -> SafetensorsWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        os.close(self._file) if kind else self.close()

    def _put(self, data, offset: int) -> None:
        view = memoryview(data).cast("B")
        try:
            while view.nbytes:
                written = os.pwrite(self._file, view, offset)
                view, offset = view[written:], offset + written
        except OSError as error:
            raise out_of_space(error, self.path) from None


def write_tensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    *,
    dtype: torch.dtype | None = None,
    metadata: Mapping[str, str] | None = None,
) -> None:
    """Write a dict of tensors, one at a time; floating ones rounded to ``dtype`` where it is given.

    Raises:
        CapacityError: the disk is full.
    """

    def target(tensor: Tensor) -> torch.dtype:
        return dtype if dtype is not None and tensor.dtype.is_floating_point else tensor.dtype

    header = {name: (target(tensor), tuple(tensor.shape)) for name, tensor in tensors.items()}
    with SafetensorsWriter(path, header, metadata=metadata) as writer:
        for name, tensor in tensors.items():
            writer.write(name, tensor)


def out_of_space(error: OSError, path: Path) -> Exception:
    """``error`` itself, or the CapacityError that says what to do where the disk is full."""
    if is_out_of_space(error):
        return CapacityError(f"{path}: no space left on the disk; free some, or choose another output folder")
    return error


def total_bytes(tensors: Iterable[tuple[torch.dtype, tuple[int, ...]]]) -> int:
    """Bytes that tensors of these dtypes and shapes take."""
    return sum(dtype.itemsize * math.prod(shape) for dtype, shape in tensors)
