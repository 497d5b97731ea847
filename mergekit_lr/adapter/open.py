"""Open an adapter of whatever dialect: a PEFT folder, or one file of any tool."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

from mergekit_lr.adapter import comfy, diffusers, kohya, lycoris, peft
from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.detect import detect
from mergekit_lr.checkpoint.hub import local_path
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.safetensors import read_header
from mergekit_lr.errors import FormatError

READERS = {
    "kohya": kohya.open_kohya,
    "lycoris": lycoris.open_lycoris,
    "diffusers": diffusers.open_diffusers,
    "comfy": comfy.open_comfy,
}
# Parts of keys that only an adapter's file has.
MARKS = (".lora_", "_lora.", ".lora.", ".hada_", ".lokr_", ".alpha")


class Opened(NamedTuple):
    """An adapter and the dialect that its file was in."""

    adapter: Adapter
    dialect: str


def is_adapter(path: Path) -> bool:
    """Whether ``path`` holds an adapter rather than a whole checkpoint, from its configuration or its keys."""
    if path.is_dir():
        return (path / "adapter_config.json").exists() and not (path / "config.json").exists()
    if path.suffix != ".safetensors":
        return False
    return any(mark in name for name in read_header(path)[0] for mark in MARKS)


def open_adapter(ref: str | Path, *, layout: Layout | None = None) -> Opened:
    """Open the adapter at ``ref``: a PEFT folder, a file of any dialect, or a Hub id of a PEFT adapter.

    Args:
        ref: where it is. layout: the base model, where it is known; it settles names and kinds.

    Raises:
        FormatError: no adapter, or one that cannot be read, with the reason.
    """
    path = local_path(str(ref))
    if path.is_file() and path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").exists():
        path = path.parent
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            return Opened(peft.open_peft(path, layout=layout), "peft")
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise FormatError(f"{path}: no adapter_config.json and not a single .safetensors file; name the file")
        path = files[0]
    dialect = detect(read_header(path)[0])
    if dialect == "peft":
        raise FormatError(f"{path}: PEFT's tensors without the adapter_config.json that holds their ranks and scales")
    base = dict(layout.by_name) if layout is not None else None
    return Opened(READERS[dialect](path, base=base), dialect)
