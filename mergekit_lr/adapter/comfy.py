"""The ComfyUI dialect, ai-toolkit's too: ``diffusion_model.<path>.lora_A.weight``, ``.lora_B.weight``, ``.alpha``.

Module paths keep their dots and are those of a model's original code. ``lora_down``/``lora_up`` for A and B,
LyCORIS tensors and differences in full occur as well. Text encoders are under ``text_encoders.``.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.file import Source, read_file, with_hashes, write_file
from mergekit_lr.adapter.kohya import IMAGE_MODELS, in_components, refuse_leftovers
from mergekit_lr.adapter.parts import by_module, change_of, parts_of
from mergekit_lr.checkpoint.parameter import Parameter
from mergekit_lr.errors import FormatError, MismatchError, UsageError

COMPONENTS = ("diffusion_model", "text_encoders")
_NAMES = {
    "A": "lora_A.weight",
    "B": "lora_B.weight",
    "alpha": "alpha",
    "magnitude": "dora_scale",
    "bias": "lora_B.bias",
}


def open_comfy(
    source: Source, *, metadata: Mapping[str, str] | None = None, base: Mapping[str, Parameter] | None = None
) -> Adapter:
    """Read a ComfyUI or ai-toolkit file.

    Args:
        source: Path of the file, or its tensors.
        metadata: Metadata to add to the file's.
        base: The base's parameters by name, with or without component; checks names and shapes.

    Raises:
        FormatError: no safetensors file, unknown or missing tensors.
        MismatchError: a module that the base does not have, or that has another shape there.
    """
    tensors, found, where = read_file(source, metadata)
    return read_dotted(tensors, found, where, base, COMPONENTS)


def save_comfy(adapter: Adapter, path: str | Path) -> None:
    """Write a ComfyUI file; factors and alphas as they are.

    Raises:
        UsageError: names of another component, or tensors that the dialect has no place for.
    """
    refuse_leftovers(adapter, "ComfyUI", keep=("added",))
    tensors: dict[str, Tensor] = {}
    for name, difference in adapter.added.items():
        tensors[f"{_module(name)}.{'diff_b' if name.endswith('.bias') else 'diff'}"] = difference
    for name, weight in adapter.weights.items():
        module, parts = _module(name), parts_of(weight)
        if "bias" in parts:
            tensors[f"{module}.diff_b"] = parts.pop("bias") * weight.delta.scaling
        if "magnitude" in parts and parts["magnitude"].ndim == 1:
            axes = (1,) * (parts["A"].ndim - 1)
            parts["magnitude"] = parts["magnitude"].reshape(-1, *axes).contiguous()
        tensors |= {f"{module}.{_NAMES[part]}": tensor for part, tensor in parts.items()}
    metadata = with_hashes(tensors, adapter.metadata) if "sshs_model_hash" in adapter.metadata else adapter.metadata
    write_file(path, tensors, metadata)


def read_dotted(
    tensors: Mapping[str, Tensor],
    metadata: dict[str, str],
    where: str,
    base: Mapping[str, Parameter] | None,
    components: tuple[str, ...],
) -> Adapter:
    """An adapter from tensors whose modules are paths with dots under one of ``components``."""
    weights: dict[str, AdaptedWeight] = {}
    added: dict[str, Tensor] = {}
    known = in_components(base or {})
    groups = {_group(name) for name in known}
    for module, parts in by_module(tensors, where).items():
        if module.partition(".")[0] not in components:
            raise FormatError(f"{where}: module {module} is under none of {', '.join(components)}")
        parameter = known.get(f"{module}.weight")
        if parameter is None and _group(module) in groups:
            raise MismatchError(f"{where}: the base has no module {module}")
        change = change_of(module, parts, parameter)
        if change.weight is not None:
            weights[f"{module}.weight"] = change.weight
        if change.added is not None:
            added[f"{module}.weight"] = change.added
        if change.added_bias is not None:
            added[f"{module}.bias"] = change.added_bias
    return Adapter(weights, metadata=metadata, added=added)


def _group(name: str) -> str:
    """What of a base a name belongs to: its image model, or one of its text encoders."""
    component = name.partition(".")[0]
    return "image" if component in IMAGE_MODELS else component


def _module(name: str) -> str:
    module = name.rpartition(".")[0]
    if module.partition(".")[0] not in COMPONENTS:
        raise UsageError(
            f"{name}: has diffusers' module names, ComfyUI's own are others; save as diffusers, which ComfyUI loads too"
        )
    return module
