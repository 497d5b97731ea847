"""The diffusers dialect: ``unet.``, ``transformer.`` or ``text_encoder.`` before the module's path.

Three generations are read: PEFT's words (``to_q.lora_A.weight``), the older ``to_q.lora.down.weight``, and the
oldest, with adapters beside the layers they change (``attn1.processor.to_q_lora.down.weight``), which may lack
the component in front. Scales come from PEFT's configuration as JSON in the metadata, from ``alpha`` tensors,
or are 1. Written are PEFT's words and, where modules differ, the configuration.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.comfy import read_dotted
from mergekit_lr.adapter.file import Source, read_file, with_hashes, write_file
from mergekit_lr.adapter.kohya import refuse_leftovers
from mergekit_lr.adapter.ldm import in_diffusers_names, is_ldm
from mergekit_lr.adapter.parts import parts_of
from mergekit_lr.adapter.variants.site import match
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, UsageError

COMPONENTS = ("unet", "transformer", "transformer_2", "text_encoder", "text_encoder_2", "text_encoder_3", "controlnet")
CONFIG = "lora_adapter_metadata"
_BARE = ("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding")
_NAMES = {"A": "lora_A.weight", "B": "lora_B.weight", "bias": "lora_B.bias", "magnitude": "lora_magnitude_vector"}
_BESIDE_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}


def open_diffusers(
    source: Source, *, metadata: Mapping[str, str] | None = None, base: Mapping[str, Parameter] | None = None
) -> Adapter:
    """Read a diffusers LoRA of any generation.

    Args:
        source: Path of the file, or its tensors.
        metadata: Metadata to add to the file's.
        base: The base's parameters by name, with or without component; checks names and shapes.

    Raises:
        FormatError: no safetensors file, unknown or missing tensors, a configuration that is not JSON.
        MismatchError: a module that the base does not have, or that has another shape there.
    """
    tensors, found, where = read_file(source, metadata)
    renamed = {_modern(key): tensor for key, tensor in tensors.items()}
    if len(renamed) != len(tensors):
        raise FormatError(f"{where}: the same module is adapted under an old and a new name; the file mixes dialects")
    adapter = read_dotted(renamed, found, where, base, COMPONENTS)
    config = _config(found, where)
    if not config:
        return adapter
    weights = {name: _scaled(name, weight, config, renamed) for name, weight in adapter.weights.items()}
    rest = {key: value for key, value in found.items() if key != CONFIG}
    return replace(adapter, weights=weights, config=config, metadata=rest)


def save_diffusers(adapter: Adapter, path: str | Path) -> None:
    """Write a diffusers LoRA in PEFT's words.

    Factors stay as they are where alpha is the rank (scale 1, which needs no configuration); otherwise the scale
    goes into B. A configuration is written as well where ranks differ, for older versions read those wrongly. A
    Stable Diffusion UNet's original module names become diffusers' own.

    Raises:
        UsageError: names that are no diffusers component's, or tensors that the dialect has no place for.
    """
    adapter = in_diffusers_names(adapter) if is_ldm(adapter) else adapter
    refuse_leftovers(adapter, "diffusers", keep=())
    tensors: dict[str, Tensor] = {}
    for name, weight in adapter.weights.items():
        component, _, _ = name.partition(".")
        if component not in COMPONENTS:
            raise UsageError(
                f"{name}: is named as in the model's original code, which diffusers names otherwise; save as kohya or "
                "comfy, or convert with diffusers"
            )
        if weight.bias is not None:
            bias = weight.bias * weight.delta.scaling
            weight = replace(weight, bias=bias)
        delta = weight.delta if weight.delta.scaling == 1 else weight.delta.folded()
        parts = parts_of(replace(weight, delta=delta))
        del parts["alpha"]
        if "magnitude" in parts:
            parts["magnitude"] = _peft_magnitude(name, weight)
        module = name.rpartition(".")[0]
        tensors |= {f"{module}.{_NAMES[part]}": tensor for part, tensor in parts.items()}
    metadata = {"format": "pt"} | {key: value for key, value in adapter.metadata.items() if key != CONFIG}
    if "sshs_model_hash" in metadata:
        metadata = with_hashes(tensors, metadata)
    if len({weight.delta.rank for weight in adapter.weights.values()}) > 1:
        metadata[CONFIG] = json.dumps(_configuration(adapter), indent=2, sort_keys=True)
    write_file(path, tensors, metadata)


def _modern(key: str) -> str:
    """The key with its component in front, without ``.processor``, layers of old adapters named as modules."""
    key = key.replace(".processor.", ".")
    if key.partition(".")[0] in _BARE:
        key = f"unet.{key}"
    beside = re.fullmatch(r"(.*)\.(to_[qkv]|to_out)_lora\.(down|up)\.weight", key)
    if beside:
        path, layer, side = beside.groups()
        layer = _BESIDE_TEXT[layer] if key.startswith("text_encoder") else layer.replace("to_out", "to_out.0")
        key = f"{path}.{layer}.lora.{side}.weight"
    return key


def _config(metadata: Mapping[str, str], where: str) -> dict[str, Any]:
    """PEFT's configuration, fields as ``unet.r`` (bare in a file of one model); empty where there is none."""
    text = metadata.get(CONFIG)
    if not text:
        return {}
    try:
        config = json.loads(text)
    except ValueError:
        config = None
    if not isinstance(config, dict):
        raise FormatError(f"{where}: the metadata {CONFIG} is not a table in JSON")
    return config


def _scaled(
    name: str, weight: AdaptedWeight, config: Mapping[str, Any], tensors: Mapping[str, Tensor]
) -> AdaptedWeight:
    """The weight with the scale that the configuration gives its module; an ``alpha`` tensor has priority."""
    component, _, module = name.rpartition(".")[0].partition(".")

    def field(key: str) -> Any:
        return config.get(f"{component}.{key}", config.get(key))

    if field("lora_alpha") is None or f"{component}.{module}.alpha" in tensors:
        return weight
    alpha = match(field("alpha_pattern") or {}, module, field("lora_alpha"))
    rank = weight.delta.rank
    root = rank**0.5 if field("use_rslora") else rank
    return replace(weight, delta=replace(weight.delta, scaling=alpha / root))


def _configuration(adapter: Adapter) -> dict[str, Any]:
    """PEFT's configuration per component, alpha = rank for every module; anchored names, as PEFT matches endings."""
    config: dict[str, Any] = {}
    for component in sorted({name.partition(".")[0] for name in adapter.weights}):
        members = {
            name.rpartition(".")[0].partition(".")[2]: weight
            for name, weight in adapter.weights.items()
            if name.partition(".")[0] == component
        }
        ranks = {module: weight.delta.rank for module, weight in members.items()}
        common = max(sorted(set(ranks.values())), key=list(ranks.values()).count)
        pattern = {f"^{re.escape(module)}": rank for module, rank in ranks.items() if rank != common}
        fields = {
            "peft_type": "LORA",
            "r": common,
            "lora_alpha": common,
            "rank_pattern": pattern,
            "alpha_pattern": pattern,
            "target_modules": sorted(members),
            "use_dora": any(weight.magnitude is not None for weight in members.values()),
            "lora_bias": any(weight.bias is not None for weight in members.values()),
        }
        config |= {f"{component}.{field}": value for field, value in fields.items()}
    return config


def _peft_magnitude(name: str, weight: AdaptedWeight) -> Tensor:
    """The magnitude in PEFT's axes: (d_out,), for a convolution (1, d_out, 1, ...)."""
    magnitude = weight.magnitude if weight.magnitude is not None else torch.empty(0)
    if magnitude.ndim != 1:
        raise UsageError(f"{name}: a DoRA over input channels exists in LyCORIS files only; save as lycoris")
    if weight.kind is Kind.CONVOLUTION and weight.shape is not None:
        return magnitude.reshape(1, -1, *(1 for _ in weight.shape[2:]))
    return magnitude
