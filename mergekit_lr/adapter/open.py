"""Open an adapter of whatever dialect: a PEFT folder, or one file of any tool."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mergekit_lr.adapter import comfy, diffusers, kohya, lycoris, peft
from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.detect import detect
from mergekit_lr.adapter.file import read_file
from mergekit_lr.adapter.variants.reading import REPLACING, TYPES, Variant, open_variant
from mergekit_lr.adapter.variants.residual import method_of
from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.checkpoint.hub import local_path
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.pair import layout_of, read_whole
from mergekit_lr.checkpoint.parameter import Parameter
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


def is_computed(config: Mapping[str, Any]) -> bool:
    """Whether a PEFT adapter's changes are no product of its factors alone, but are computed, from its base or not."""
    return config.get("peft_type") in (*TYPES, *REPLACING) or bool(method_of(config))


def read_variant(
    folder: Path, config: Mapping[str, Any], layout: Layout, read: Callable[[Parameter], Tensor]
) -> Variant:
    """An adapter of another PEFT type than LoRA, its changes still to be computed.

    Args:
        folder: of the adapter. config: the content of its adapter_config.json. layout: of the base. read: a
            parameter of the base to its tensor.

    Raises:
        FormatError: it cannot be read.
    """
    tensors, metadata, _ = read_file(folder / "adapter_model.safetensors")
    return open_variant(tensors, config, layout.by_name, read=read, metadata=metadata)


def open_adapter(ref: str | Path, *, layout: Layout | None = None, base: Checkpoint | None = None) -> Opened:
    """Open the adapter at ``ref``: a PEFT folder, a file of any dialect, or a Hub id of a PEFT adapter.

    Args:
        ref: where it is. layout: the base model, where it is known; it settles names and kinds. base: its weights,
            which some of PEFT's types need; their changes are then all computed at once, in memory.

    Raises:
        FormatError: no adapter, or one that cannot be read, with the reason.
    """
    if base is not None and layout is None:
        layout = layout_of(base)
    path = local_path(str(ref))
    if path.is_file() and path.name == "adapter_model.safetensors" and (path.parent / "adapter_config.json").exists():
        path = path.parent
    if path.is_dir():
        if (path / "adapter_config.json").exists():
            config = read_config(path / "adapter_config.json")
            if base is not None and layout is not None and is_computed(config):
                variant = read_variant(path, config, layout, lambda parameter: read_whole(base, parameter))
                return Opened(variant.adapter(), f"peft, {config['peft_type']}")
            if config.get("peft_type") in (*TYPES, *REPLACING):
                raise FormatError(
                    f"{path}: of PEFT's type {config['peft_type']}, which is read through its base; give the base, or "
                    "make it a LoRA first: lrmerge convert IN -o OUT --to peft --base BASE"
                )
            return Opened(peft.open_peft(path, layout=layout), "peft")
        files = sorted(path.glob("*.safetensors"))
        if len(files) != 1:
            raise FormatError(f"{path}: no adapter_config.json and not a single .safetensors file; name the file")
        path = files[0]
    dialect = detect(read_header(path)[0])
    if dialect == "peft":
        raise FormatError(f"{path}: PEFT's tensors without the adapter_config.json that holds their ranks and scales")
    known = dict(layout.by_name) if layout is not None else None
    return Opened(READERS[dialect](path, base=known), dialect)
