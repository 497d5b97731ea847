"""One adapter file: its tensors and its string metadata, read and written."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save
from torch import Tensor

from mergekit_lr.checkpoint.pickled import read_pickled
from mergekit_lr.checkpoint.safetensors import read_header, read_tensor
from mergekit_lr.checkpoint.writer import out_of_space
from mergekit_lr.errors import FormatError

PICKLED = (".pt", ".pth", ".bin", ".ckpt")
Source = str | Path | Mapping[str, Tensor]


def read_file(
    source: Source, metadata: Mapping[str, str] | None = None
) -> tuple[dict[str, Tensor], dict[str, str], str]:
    """Tensors (mapped, not copied), metadata and a name for messages, of a file or of tensors in memory.

    Raises:
        FormatError: there is no such file, or it is no whole safetensors file and no table of PyTorch tensors.
    """
    if isinstance(source, Mapping):
        return dict(source), dict(metadata or {}), "adapter"
    path = Path(source)
    if not path.is_file():
        raise FormatError(f"{path}: there is no such adapter file")
    if path.suffix in PICKLED:
        return read_pickled(path), dict(metadata or {}), str(path)
    infos, found = read_header(path)
    return {name: read_tensor(info) for name, info in infos.items()}, found | dict(metadata or {}), str(path)


def write_file(path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write the file whole or not at all: under another name first, then renamed.

    Raises:
        CapacityError: the disk is full.
    """
    path = Path(path)
    partial = path.with_name(path.name + ".partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(_serialised(tensors, metadata))
        os.replace(partial, path)
    except OSError as error:
        partial.unlink(missing_ok=True)
        raise out_of_space(error, path) from None


def with_hashes(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> dict[str, str]:
    """``metadata`` with the hashes that stable-diffusion tools know a file by, computed again.

    ``sshs_model_hash`` is SHA-256 over all tensor bytes; ``sshs_legacy_hash`` eight digits of SHA-256 over 64 KiB
    that lie 1 MiB into a file with the training metadata alone. ``modelspec.hash_sha256`` follows the first where
    a file has it.
    """
    training = {key: value for key, value in metadata.items() if key.startswith("ss_")}
    data = _serialised(tensors, training)
    body = data[8 + int.from_bytes(data[:8], "little") :]
    whole = hashlib.sha256(body).hexdigest()
    legacy = hashlib.sha256(data[0x100000:0x110000]).hexdigest()[:8]
    hashes = {"sshs_model_hash": whole, "sshs_legacy_hash": legacy}
    if "modelspec.hash_sha256" in metadata:
        hashes["modelspec.hash_sha256"] = f"0x{whole}"
    return {**metadata, **hashes}


def _serialised(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    return save({name: tensor.contiguous() for name, tensor in tensors.items()}, dict(metadata) or None)
