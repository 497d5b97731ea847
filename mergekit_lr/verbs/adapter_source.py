"""What ``compress`` and ``convert`` read: an adapter of any dialect, and its base where that is given."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.components import COMPONENTS
from mergekit_lr.adapter.open import is_computed, open_adapter, read_variant
from mergekit_lr.adapter.variants import Variant
from mergekit_lr.adapter.variants.residual import method_of
from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.checkpoint.hub import local_path
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.pair import layout_of, read_whole
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.checkpoint.safetensors import TensorInfo, read_header
from mergekit_lr.errors import FormatError, UsageError

PEFT_FILE = "adapter_model.safetensors"
_SINGLE_EXPERT = re.compile(r"\.experts\.\d+\.")


@dataclass(frozen=True)
class Base:
    """The model that an adapter belongs to."""

    checkpoint: Checkpoint

    @cached_property
    def layout(self) -> Layout:
        """Its parameters in memory."""
        return layout_of(self.checkpoint)

    def read(self, parameter: Parameter) -> Tensor:
        """A parameter in its own layout and shape."""
        return read_whole(self.checkpoint, parameter)


@dataclass(frozen=True)
class Source:
    """What was read.

    ref: what the user called it. path: its folder or file, None in memory. adapter: the adapter; of a ``variant``
    everything but the changes of weights. dialect: of its file. variant: an adapter of PEFT's whose changes are still
    to be computed. nbytes: of its file.
    """

    ref: str
    path: Path | None
    adapter: Adapter
    dialect: str
    variant: Variant | None
    tensors: dict[str, TensorInfo]
    nbytes: int

    @property
    def inputs(self) -> list[Path]:
        """What must not be overwritten."""
        return [self.path] if self.path else []

    def described(self) -> Checkpoint:
        """The file for a manifest."""
        folder = self.path.parent if self.path and self.path.is_file() else self.path
        return Checkpoint(self.ref, folder, self.tensors)


def open_base(base: str | Path | Checkpoint | Mapping[str, Tensor] | None) -> Base | None:
    """The base, headers only; None where none is given."""
    return None if base is None else Base(Checkpoint.open(base))


def open_source(ref: str | Path | Adapter, base: Base | None = None) -> Source:
    """Open an adapter of any dialect and of any of PEFT's types.

    Raises:
        FormatError: no adapter, or one that cannot be read.
        UsageError: an adapter that cannot be read without its base.
    """
    if isinstance(ref, Adapter):
        in_pipeline = bool(ref.weights) and all(name.partition(".")[0] in COMPONENTS for name in ref.weights)
        dialect = "diffusers" if in_pipeline else "peft"
        return Source("memory", None, _with_plain_magnitudes(ref), dialect, None, {}, _nbytes(ref))
    path = local_path(str(ref))
    if path.is_file() and path.name == PEFT_FILE and (path.parent / "adapter_config.json").exists():
        path = path.parent
    if path.is_dir() and (path / "adapter_config.json").exists():
        return _open_folder(str(ref), path, base)
    adapter, dialect = open_adapter(path, layout=base.layout if base else None)
    file = path if path.is_file() else next(path.glob("*.safetensors"))
    infos = read_header(file)[0] if file.suffix == ".safetensors" else {}
    return Source(str(ref), file, _with_plain_magnitudes(adapter), dialect, None, infos, file.stat().st_size)


def _open_folder(ref: str, path: Path, base: Base | None) -> Source:
    file, config = path / PEFT_FILE, read_config(path / "adapter_config.json")
    if not file.is_file():
        raise FormatError(f"{file}: no such file; a PEFT adapter has one")
    infos, metadata = read_header(file)
    metadata = {key: value for key, value in metadata.items() if key != "format"}
    size = file.stat().st_size
    if is_computed(config):
        variant = _open_variant(path, config, base)
        adapter = Adapter({}, variant.saved, variant.token_rows, variant.base, _plain_config(config), metadata)
        return Source(ref, path, adapter, "peft", variant, infos, size)
    refuse_residual(config, str(path))
    # Single experts go by their names on disk, which a model in memory does not have.
    single = any(_SINGLE_EXPERT.search(name) for name in infos)
    adapter = open_adapter(path, layout=base.layout if base and not single else None).adapter
    adapter = _with_plain_magnitudes(replace(adapter, metadata=adapter.metadata | metadata))
    return Source(ref, path, adapter, "peft", None, infos, size)


def refuse_residual(config: Mapping[str, Any], where: str) -> None:
    """Stop at factors that fit another base than the one on disk, and that nothing here can put right.

    Raises:
        FormatError: the factors are relative to what their initialisation left of the base.
    """
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(("pissa", "olora", "corda", "lora_ga", "loftq", "mica")):
        raise FormatError(
            f"{where}: init_lora_weights is {start}, so the factors fit only the base that this initialisation left "
            "behind; save the adapter with PEFT's path_initial_model_for_weight_conversion"
        )


def _open_variant(path: Path, config: dict[str, Any], base: Base | None) -> Variant:
    if base is None:
        kind = method_of(config) or config["peft_type"]
        raise UsageError(f"{path}: an adapter of type {kind} needs its base to be read; give --base")
    return read_variant(path, config, base.layout, base.read)


def _plain_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Of another type's configuration, what a LoRA's has as well and that is still true of it."""
    return {key: config[key] for key in ("task_type", "revision", "modules_to_save") if config.get(key) is not None}


def _with_plain_magnitudes(adapter: Adapter) -> Adapter:
    """DoRA magnitudes of convolutions as (d_out,), whatever axes PEFT gives them."""
    weights = {
        name: replace(weight, magnitude=weight.magnitude.flatten())
        if weight.magnitude is not None and weight.kind is Kind.CONVOLUTION and weight.magnitude.ndim > 2
        else weight
        for name, weight in adapter.weights.items()
    }
    return replace(adapter, weights=weights)


def _nbytes(adapter: Adapter) -> int:
    factors = sum(w.delta.A.nbytes + w.delta.B.nbytes for w in adapter.weights.values())
    return factors + sum(t.nbytes for t in (*adapter.saved.values(), *adapter.added.values()))
