"""A checkpoint: a named collection of tensors, opened by its headers and read one tensor at a time.

It may be a folder with one file or with shards and an index, a single file, a Hub id ``org/name@revision``, or
a dict in memory. Opening reads headers and ``config.json`` only, those of a model on the Hub too: its weights are
fetched when the first of them is read, or by ``fetch``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeAlias

import torch
from torch import Tensor

from mergekit_lr.checkpoint import hub
from mergekit_lr.checkpoint.pickled import read_pickled
from mergekit_lr.checkpoint.quantized import Scale, dequantise, find_scales
from mergekit_lr.checkpoint.safetensors import TensorInfo, announce, parts, read_header, read_tensor
from mergekit_lr.errors import FormatError, MismatchError

# File stems in the order in which transformers and diffusers would pick them.
STEMS = ("model", "diffusion_pytorch_model", "pytorch_model")
# Parts of names that only the file of an adapter has.
ADAPTER_MARKS = (".lora_A.", ".lora_B.", ".lora_down.", ".lora_up.", ".hada_w1", ".lokr_w1")
REQUESTS = 8  # for headers, to the Hub, at a time
SHARD = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.(safetensors|bin)$")


_File: TypeAlias = tuple[dict[str, TensorInfo], dict[str, str], dict[str, Tensor]]


@dataclass(frozen=True)
class Checkpoint:
    """Tensors by name, and the configuration beside them.

    ref: what the user called it. folder: where its files lie (None in memory). tensors: name on disk to its
    place, dtype and shape. config: the content of config.json, empty where there is none. metadata: the string
    metadata of the files. remote: where the files are that are not here yet. named_file: whether the user named a file,
    in a folder where other things may lie.
    """

    ref: str
    folder: Path | None
    tensors: dict[str, TensorInfo]
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    _memory: dict[str, Tensor] = field(default_factory=dict, repr=False)
    _scales: dict[str, Scale] = field(default_factory=dict, repr=False)
    remote: hub.Remote | None = field(default=None, repr=False)
    named_file: bool = False

    @classmethod
    def open(cls, ref: str | Path | Checkpoint | Mapping[str, Tensor]) -> Checkpoint:
        """Open a folder, a file, a Hub id or a dict of tensors; headers only.

        Raises:
            FormatError: a file is missing, truncated or contradicts itself.
            MismatchError: an adapter where a checkpoint is expected.
            HubError: the Hub has no such model, refuses it or cannot be reached.
        """
        if isinstance(ref, Checkpoint):
            return ref
        if isinstance(ref, Mapping):
            return cls.from_tensors(ref)
        path, remote = hub.find(str(ref))
        if path.is_dir():
            _refuse_adapter(path, str(ref))
            folder, names = path, {file.name for file in path.iterdir() if file.is_file()}
            files = _files_of_folder(path, names | (remote.weights if remote else set()), str(ref))
        else:
            folder = path.parent
            files = _shards_of(path, {file.name for file in folder.iterdir()})
        if remote is not None and all(file.exists() for file in files):
            remote = None
        tensors: dict[str, TensorInfo] = {}
        memory: dict[str, Tensor] = {}
        metadata: dict[str, str] = {}
        for (file, expected), (found, said, held) in zip(files.items(), _opened(files, remote), strict=True):
            _compare_with_index(file, found, expected, folder)
            if twice := tensors.keys() & found.keys():
                raise FormatError(f"{folder}: tensor {min(twice)} is in more than one file")
            tensors |= found
            metadata |= said
            memory |= held
        if not tensors:
            raise FormatError(f"{ref}: holds no tensors")
        config = read_config(folder / "config.json")
        whole = cls._assembled(str(ref), folder, tensors, config, metadata, memory)
        return replace(whole, remote=remote, named_file=not path.is_dir())

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], *, config: dict[str, Any] | None = None, ref: str = "memory"
    ) -> Checkpoint:
        """A checkpoint in memory; the tensors are shared, not copied."""
        return cls._assembled(ref, None, _places(tensors, Path(ref)), dict(config or {}), {}, dict(tensors))

    @classmethod
    def _assembled(cls, ref, folder, tensors, config, metadata, memory) -> Checkpoint:
        if any(mark in name for name in tensors for mark in ADAPTER_MARKS):
            raise MismatchError(f"{ref}: is an adapter, not a checkpoint; give the whole model")
        scales = find_scales(tensors)
        for scale in scales.values():
            tensors.pop(scale.name, None)  # part of the weight that it scales, no tensor of its own
        return cls(ref, folder, tensors, config, metadata, memory, scales)

    def read(self, name: str, index: int | None = None) -> Tensor:
        """The tensor ``name`` (or entry ``index`` of its first axis), mapped from its file. Do not write into it.

        An fp8 tensor with a scale comes dequantised, in float32.
        """
        if name in self._scales:
            scale = self._scales[name]
            return dequantise(self._stored(name, self.tensors[name]), self._stored(*scale[:2]), scale.block)
        return self._stored(name, self.tensors[name], index)

    def fetch(self) -> None:
        """Download the files of a model on the Hub that are not here yet.

        Raises:
            HubError: the Hub refuses them or cannot be reached.
        """
        if self.remote is not None:
            self.remote.fetch(file.name for file in self.files)

    def has_parts(self, name: str) -> bool:
        """Whether a part of ``name`` can be read without the rest."""
        return name not in self._scales

    def parts(self, name: str) -> Callable[[int, int], Tensor]:
        """What gives elements [start, stop) of a tensor that has parts, counted flat. Do not write into them."""
        if name in self._memory:
            flat = self._memory[name].reshape(-1)
            return lambda start, stop: flat[start:stop]
        self.fetch()
        return parts(self.tensors[name])

    def announce(self, name: str) -> None:
        """Say that ``name`` is going to be read in parts soon."""
        if name not in self._memory:
            self.fetch()
            announce(self.tensors[name])

    def _stored(self, name: str, info: TensorInfo, index: int | None = None) -> Tensor:
        if name in self._memory:
            tensor = self._memory[name]
            return tensor if index is None else tensor[index]
        self.fetch()
        return read_tensor(info, index)

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(info.nbytes for info in self.tensors.values())

    @property
    def to_download(self) -> int:
        """Bytes of the tensors in files that ``fetch`` would download."""
        if self.remote is None:
            return 0
        missing = {file for file in self.files if not file.exists()}
        return sum(info.nbytes for info in self.tensors.values() if info.file in missing)

    @property
    def files(self) -> list[Path]:
        """The files that hold the tensors, in name order."""
        return sorted({info.file for info in self.tensors.values()})


def read_config(path: Path) -> dict[str, Any]:
    """The JSON object in ``path``; empty where there is no such file.

    Raises:
        FormatError: the file is there but holds no JSON object.
    """
    if not path.exists():
        return {}
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise FormatError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(config, dict):
        raise FormatError(f"{path}: a JSON object is expected")
    return config


def _opened(files: Iterable[Path], remote: hub.Remote | None) -> Iterable[_File]:
    """Every file in order: its tensors, its metadata, and the tensors in memory where it has no header to map by."""
    if remote is None:
        return map(_open_file, files)
    with ThreadPoolExecutor(REQUESTS) as requests:
        headers = requests.map(remote.header, (file.name for file in files))
        return [(tensors, metadata, {}) for tensors, metadata in headers]


def _open_file(path: Path) -> _File:
    if not path.is_file():
        raise FormatError(f"{path}: no such file")
    if path.suffix == ".safetensors":
        tensors, metadata = read_header(path)
        return tensors, metadata, {}
    if path.suffix in (".bin", ".pt", ".pth"):
        held = read_pickled(path)
        return _places(held, path), {}, held
    raise FormatError(f"{path}: not a checkpoint file; .safetensors or .bin is expected")


def _places(held: Mapping[str, Tensor], path: Path) -> dict[str, TensorInfo]:
    return {name: TensorInfo(t.dtype, tuple(t.shape), path, 0, t.nbytes) for name, t in held.items()}


def _refuse_adapter(folder: Path, ref: str) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        base = read_config(folder / "adapter_config.json").get("base_model_name_or_path")
        raise MismatchError(
            f"{ref}: is an adapter (of {base or 'an unnamed base'}), not a checkpoint; give the whole model"
        )


def _files_of_folder(folder: Path, names: Set[str], ref: str) -> dict[Path, set[str] | None]:
    """Each file of the model in ``folder`` with the tensors that the index expects in it (None without index).

    names: of all files that are there, or will be.
    """
    for suffix in ("safetensors", "bin"):
        for stem in STEMS:
            if (index := f"{stem}.{suffix}.index.json") in names:
                return _files_of_index(folder / index, names)
            if (single := f"{stem}.{suffix}") in names:
                return {folder / single: None}
        left_out = ("adapter_model", "training_args")
        found = sorted(name for name in names if name.endswith(f".{suffix}") and not name.startswith(left_out))
        if len(found) == 1 or (found and len({m[1] for name in found if (m := SHARD.match(name))}) == 1):
            return _shards_of(folder / found[0], names)
        if found:
            several = ", ".join(found[:4])
            raise FormatError(f"{folder}: several checkpoint files and no index ({several}); name the one you mean")
    raise FormatError(f"{ref}: no checkpoint file in this folder (model.safetensors or shards with an index)")


def _files_of_index(index: Path, names: Set[str]) -> dict[Path, set[str] | None]:
    weight_map = read_config(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise FormatError(f"{index}: has no weight_map")
    files: dict[Path, set[str] | None] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file or "\\" in file or file in ("", ".", ".."):
            raise FormatError(f"{index}: tensor {name} points outside the folder ({file!r}); refused")
        path = index.parent / file
        expected = files.setdefault(path, set())
        if expected is not None:
            expected.add(name)
    for path in files:
        if path.name not in names:
            raise FormatError(f"{index}: names the shard {path.name}, which is not in the folder; download it")
    return files


def _shards_of(path: Path, names: Set[str]) -> dict[Path, set[str] | None]:
    """``path`` alone, or all shards of the set that it is one of, complete."""
    match = SHARD.match(path.name)
    if match is None:
        return {path: None}
    count = int(match[3])
    shards = [f"{match[1]}-{i:05d}-of-{count:05d}.{match[4]}" for i in range(1, count + 1)]
    for shard in shards:
        if shard not in names:
            raise FormatError(f"{path.parent}: shard {shard} is missing; download it")
    return {path.parent / shard: None for shard in shards}


def _compare_with_index(file: Path, found: Mapping[str, TensorInfo], expected: set[str] | None, folder: Path) -> None:
    if expected is None or expected == found.keys():
        return
    if missing := expected - found.keys():
        raise FormatError(f"{file}: the index expects tensor {min(missing)} in this shard, which does not hold it")
    extra = min(found.keys() - expected)
    raise FormatError(f"{file}: holds tensor {extra}, which the index in {folder} does not list")


def storage_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The floating dtype that holds most of the checkpoint's bytes; float32 where there is none."""
    sizes: dict[torch.dtype, int] = {}
    for info in checkpoint.tensors.values():
        if info.dtype.is_floating_point:
            sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
