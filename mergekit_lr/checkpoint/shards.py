"""A whole model as safetensors shards whose headers stand before their tensors, filled in any order.

Which tensor lies in which file is decided from headers: as in the base, or cut anew at a size. Every file then gets
its final length at once, and rows are put at their places as they come: no shard and no tensor is ever held, and a
run that was killed finds its files again and goes on writing into them.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import SHARD, STEMS, Checkpoint
from mergekit_lr.checkpoint.safetensors import read_header
from mergekit_lr.checkpoint.writer import SafetensorsWriter, out_of_space, total_bytes
from mergekit_lr.errors import FormatError

Header = tuple[torch.dtype, tuple[int, ...]]
Files = dict[str, dict[str, Header]]


class Output(Protocol):
    """Where rows of tensors go."""

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Put ``part`` at number ``start`` of tensor ``name``, counted flat; ``part`` has the dtype of the output."""
        ...


def as_in(checkpoint: Checkpoint, tensors: Mapping[str, Header], beside: Mapping[str, str]) -> Files:
    """The files of ``checkpoint`` with what ``tensors`` they hold, in file order; always safetensors.

    Args:
        checkpoint: the model whose files are followed.
        tensors: every tensor of the output with its dtype and shape.
        beside: for a tensor that ``checkpoint`` lacks, one that it has and whose file it joins; else it joins the last.
    """
    places = {name: (str(info.file), info.offset) for name, info in checkpoint.tensors.items()}
    files: Files = {_file_name(Path(file)): {} for file, _ in sorted(places.values())}
    for name in sorted((name for name in tensors if name in places), key=places.__getitem__):
        files[_file_name(Path(places[name][0]))][name] = tensors[name]
    for name in tensors.keys() - places.keys():
        home = _file_name(Path(places[beside[name]][0])) if name in beside else list(files)[-1]
        files[home][name] = tensors[name]
    return {file: held for file, held in files.items() if held}


def cut_at(files: Files, size: int) -> Files:
    """The tensors of ``files``, in their order, in shards of at most ``size`` bytes; a larger tensor has its own."""
    shards: list[dict[str, Header]] = [{}]
    for name, header in ((name, header) for held in files.values() for name, header in held.items()):
        if shards[-1] and total_bytes((*shards[-1].values(), header)) > size:
            shards.append({})
        shards[-1][name] = header
    stem = _stem(next(iter(files)))
    if len(shards) == 1:
        return {f"{stem}.safetensors": shards[0]}
    return {f"{stem}-{i:05d}-of-{len(shards):05d}.safetensors": held for i, held in enumerate(shards, 1)}


class ShardedOutput:
    """The safetensors files of one model in ``folder``, laid out at once and filled row by row.

    Args:
        folder: where; it exists. files: file name to its tensors, in order. metadata: string metadata of every file.
        resume: keep files that are laid out already as they should be, with what was written into them.

    Raises:
        CapacityError: the disk is full.
    """

    def __init__(self, folder: Path, files: Files, *, metadata: Mapping[str, str], resume: bool = False):
        self._folder = folder
        self._files = files
        self._places = {}
        for name, tensors in files.items():
            path = folder / name
            if not (resume and _laid_out(path, tensors)):
                SafetensorsWriter(path, tensors, metadata=metadata).close()
            self._places |= read_header(path)[0]

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Put ``part`` at number ``start`` of tensor ``name``, counted flat.

        Raises:
            ValueError: another dtype than the header promises, or beyond the tensor's end.
            CapacityError: the disk is full.
        """
        info = self._places[name]
        offset = start * info.dtype.itemsize
        if part.dtype is not info.dtype or offset + part.nbytes > info.nbytes:
            raise ValueError(f"{name}: {part.nbytes} bytes of {part.dtype} do not fit at byte {offset} of {info.dtype}")
        data = part.detach().cpu().contiguous()
        view = memoryview(data.reshape(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]
        file = os.open(info.file, os.O_WRONLY)
        try:
            position = info.offset + offset
            while view.nbytes:
                written = os.pwrite(file, view, position)
                view, position = view[written:], position + written
        except OSError as error:
            raise out_of_space(error, info.file) from None
        finally:
            os.close(file)

    def finish(self, *, index: bool) -> None:
        """Bring all files to the disk and write the index, where ``index`` asks for one or there are several files."""
        for name in self._files:
            file = os.open(self._folder / name, os.O_RDWR)
            os.fsync(file)
            os.close(file)
        if index or len(self._files) > 1:
            weight_map = {tensor: name for name, tensors in self._files.items() for tensor in tensors}
            total = total_bytes(header for tensors in self._files.values() for header in tensors.values())
            content = {"metadata": {"total_size": total}, "weight_map": weight_map}
            path = self._folder / f"{_stem(next(iter(self._files)))}.safetensors.index.json"
            path.write_text(json.dumps(content, indent=2, sort_keys=True) + "\n", encoding="utf-8")


class MemoryOutput:
    """The same, as a dict of tensors in memory. ``shared`` tensors are taken as they are and never written."""

    def __init__(self, tensors: Mapping[str, Header], shared: Mapping[str, Tensor]):
        self.tensors = dict(shared)
        for name, (dtype, shape) in tensors.items():
            if name not in shared:
                self.tensors[name] = torch.empty(shape, dtype=dtype)

    def write(self, name: str, start: int, part: Tensor) -> None:
        """Put ``part`` at number ``start`` of tensor ``name``, counted flat."""
        self.tensors[name].view(-1)[start : start + part.numel()] = part.reshape(-1).cpu()


def has_index(checkpoint: Checkpoint) -> bool:
    """Whether the checkpoint's folder lists its shards in an index."""
    return checkpoint.folder is not None and any(_index_files(checkpoint.folder))


def _index_files(folder: Path) -> Iterable[Path]:
    return (
        folder / f"{stem}.{kind}.index.json"
        for stem in STEMS
        for kind in ("safetensors", "bin")
        if (folder / f"{stem}.{kind}.index.json").exists()
    )


def _laid_out(path: Path, tensors: Mapping[str, Header]) -> bool:
    try:
        found, _ = read_header(path)
    except (FormatError, FileNotFoundError):  # killed while it was laid out
        return False
    return {name: (info.dtype, info.shape) for name, info in found.items()} == dict(tensors)


def _file_name(file: Path) -> str:
    """The name under which a base's file is written: pickled weights become safetensors, with their usual stem."""
    if file.suffix == ".safetensors":
        return file.name
    return f"{file.stem.replace('pytorch_model', 'model') if file.suffix else 'model'}.safetensors"


def _stem(file: str) -> str:
    match = SHARD.match(file)
    return match[1] if match else Path(file).stem
