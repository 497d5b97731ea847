"""The kohya dialect: ``lora_unet_<path with underscores>.lora_down.weight``, ``.lora_up.weight``, ``.alpha``.

What stable-diffusion trainers write. A prefix names the part of the model, dots in the module's path are lost
(:mod:`~mergekit_lr.adapter.underscores` finds them again), the scale is alpha over the rank, 1 without an alpha,
and training facts are strings in the file's metadata. LyCORIS files share all that and hold more kinds of
tensors; :mod:`~mergekit_lr.adapter.lycoris` reads those.

Names in the :class:`Adapter`: the prefix becomes a component, ``text_encoder.``, ``text_encoder_2.`` ..., and for
the image model ``unet.`` or ``transformer.`` under diffusers' module names, ``diffusion_model.`` under others.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.adapter import underscores
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.file import Source, read_file, with_hashes, write_file
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.parts import by_module, change_of, parts_of
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, UsageError

_TEXT = re.compile(r"text_encoder(?:_(\d))?")
PREFIX = re.compile(r"(lora_unet|lora_transformer|lycoris|lora_te(\d?))_(.+)")
IMAGE_MODELS = ("unet", "transformer", "diffusion_model")
# First words of module paths under diffusers' names; the last row says so only where there is nothing else.
_UNET = {"down_blocks", "up_blocks", "mid_block"}
_TRANSFORMER = {"transformer_blocks", "single_transformer_blocks"}
_UNET_ALONE = {"conv_in", "conv_out", "time_embedding", "add_embedding"}
_NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha"}


def open_kohya(
    source: Source, *, metadata: Mapping[str, str] | None = None, base: Mapping[str, Parameter] | None = None
) -> Adapter:
    """Read a kohya LoRA.

    Args:
        source: Path of the file, or its tensors.
        metadata: Metadata to add to the file's.
        base: The base's parameters by name, with or without component; decides where the dots were.

    Raises:
        FormatError: no safetensors file, unknown or missing tensors, a LyCORIS file, a name whose dots are lost.
        MismatchError: a module that the base does not have, or that has another shape there.
    """
    tensors, found, where = read_file(source, metadata)
    foreign = [
        key for key in tensors if key.rpartition(".")[2] in ("diff", "diff_b", "dora_scale") or "lora_mid" in key
    ]
    if foreign or any(".hada_" in key or ".lokr_" in key for key in tensors):
        raise FormatError(f"{where}: this is a LyCORIS file, not a plain kohya LoRA; open it as lycoris")
    return read_underscored(tensors, found, where, base)


def save_kohya(adapter: Adapter, path: str | Path) -> None:
    """Write a kohya LoRA, with hashes and network facts in its metadata brought up to date.

    Factors stay as they are, except that float32 ones of different alphas get one alpha: diffusers, up to 0.42 at
    least, applies a kohya file's most frequent alpha to all attention layers.

    Raises:
        UsageError: the adapter holds what the dialect has no place for.
    """
    refuse_leftovers(adapter, "kohya", keep=())
    adapter = _with_one_alpha(adapter)
    tensors: dict[str, Tensor] = {}
    for name, weight in adapter.weights.items():
        if weight.magnitude is not None or weight.bias is not None:
            raise UsageError(f"{name}: kohya files hold no DoRA magnitude and no bias; save as lycoris")
        module = underscored(name)
        tensors |= {f"{module}.{_NAMES[part]}": tensor for part, tensor in parts_of(weight).items()}
    write_file(path, tensors, with_hashes(tensors, network_facts(adapter)))


def read_underscored(
    tensors: Mapping[str, Tensor], metadata: dict[str, str], where: str, base: Mapping[str, Parameter] | None
) -> Adapter:
    """An adapter from tensors whose modules have a prefix and underscores for dots."""
    modules = by_module(tensors, where)
    names = _Names(modules, base, where)
    weights: dict[str, AdaptedWeight] = {}
    added: dict[str, Tensor] = {}
    for module, parts in modules.items():
        path = names.paths[module]
        change = change_of(path, parts, names.parameters.get(f"{path}.weight"))
        if change.weight is not None:
            weights[f"{path}.weight"] = change.weight
        if change.added is not None:
            added[f"{path}.weight"] = change.added
        if change.added_bias is not None:
            added[f"{path}.bias"] = change.added_bias
    return Adapter(weights, metadata=metadata, added=added)


def underscored(name: str) -> str:
    """``unet.down_blocks.0.proj_in.weight`` -> ``lora_unet_down_blocks_0_proj_in``.

    Raises:
        UsageError: the parameter is no weight of an image model or of its text encoders.
    """
    component, _, module = name.rpartition(".")[0].partition(".")
    if component in IMAGE_MODELS:
        prefix = "lora_unet"
    elif match := _TEXT.fullmatch(component):
        prefix = f"lora_te{match[1] or 1}"
    else:
        raise UsageError(
            f"{name}: kohya files hold image models only: a name must begin with unet., transformer., diffusion_model. "
            "or text_encoder."
        )
    return f"{prefix}_{module.replace('.', '_')}"


def refuse_leftovers(adapter: Adapter, dialect: str, keep: tuple[str, ...]) -> None:
    """Stop before anything is lost: whatever the dialect has no place for is named."""
    for field in ("saved", "token_rows", "added"):
        names = getattr(adapter, field)
        if names and field not in keep:
            raise UsageError(f"{min(names)}: {dialect} files have no place for {field} tensors ({len(names)} of them)")
    for name, weight in adapter.weights.items():
        if weight.kind not in (Kind.LINEAR, Kind.CONVOLUTION):
            raise UsageError(f"{name}: {dialect} files hold linear layers and convolutions, this is {weight.kind}")
        if weight.delta.rank == 0:
            raise UsageError(f"{name}: rank 0 changes nothing and loads nowhere; drop it before saving")


def network_facts(adapter: Adapter) -> dict[str, str]:
    """The source's metadata with the rank and alpha that are now true: "Dynamic" where modules differ."""
    ranks = {weight.delta.rank for weight in adapter.weights.values()}
    alphas = {float(weight.delta.scaling * weight.delta.rank) for weight in adapter.weights.values()}
    facts = {"ss_network_module": "networks.lora"} | adapter.metadata
    facts["ss_network_dim"] = str(ranks.pop()) if len(ranks) == 1 else "Dynamic"
    facts["ss_network_alpha"] = f"{alphas.pop():g}" if len(alphas) == 1 else "Dynamic"
    return facts


def _with_one_alpha(adapter: Adapter) -> Adapter:
    """The same deltas with the most frequent alpha everywhere, the rest of each scale in B.

    Factors below float32 would be rounded by that, and stay.
    """
    alphas = [weight.delta.scaling * weight.delta.rank for weight in adapter.weights.values()]
    precise = all(weight.delta.B.dtype in (torch.float32, torch.float64) for weight in adapter.weights.values())
    if len(set(alphas)) < 2 or not precise:
        return adapter
    alpha = max(sorted(set(alphas)), key=alphas.count)
    if alpha == 0:
        return adapter

    def rescaled(weight: AdaptedWeight) -> AdaptedWeight:
        delta, scaling = weight.delta, alpha / weight.delta.rank
        return replace(weight, delta=LowRank(delta.A, delta.B * (delta.scaling / scaling), scaling))

    return replace(adapter, weights={name: rescaled(weight) for name, weight in adapter.weights.items()})


class _Names:
    """Paths with dots for modules with underscores."""

    def __init__(self, modules: Iterable[str], base: Mapping[str, Parameter] | None, where: str):
        self.where = where
        self.parameters = in_components(base or {})
        groups: dict[str, set[str]] = {}
        for name in self.parameters:
            component, _, rest = name.partition(".")
            groups.setdefault(_group(component), set()).add(rest.rpartition(".")[0])
        self.tables = {group: underscores.table(paths) for group, paths in groups.items()}
        # Which model it is shows in some modules only, and holds for all of them.
        paths = {module: self._path(module) for module in modules}
        known = {name.partition(".")[0] for name in self.parameters} & set(IMAGE_MODELS)
        image = known.pop() if len(known) == 1 else _image_model(path for group, path in paths.values() if not group)
        self.paths = {module: f"{group or image}.{path}" for module, (group, path) in paths.items()}

    def _path(self, module: str) -> tuple[str, str]:
        """``lora_te2_text_model_...`` -> (text_encoder_2, text_model....); ("", path) in the image model."""
        match = PREFIX.fullmatch(module)
        if match is None:
            raise FormatError(f"{self.where}: module {module} has none of the prefixes lora_unet_, lora_te_, lycoris_")
        text = match[1].startswith("lora_te")
        component = f"text_encoder_{match[2]}" if (match[2] or "1") != "1" else "text_encoder"
        table = self.tables.get(component if text else _group("unet"))
        path = table.get(match[3]) if table else underscores.read(match[3])
        if path is None:
            raise FormatError(f"{self.where}: the base has no module that {module} could stand for")
        return component if text else "", path


def in_components(base: Mapping[str, Parameter]) -> dict[str, Parameter]:
    """A base's parameters with their component in front; without one in their names they are the image model's."""
    named = {name: name.partition(".")[0] for name in base}
    bare = {name for name, first in named.items() if first not in IMAGE_MODELS and not _TEXT.fullmatch(first)}
    image = _image_model(bare)
    return {f"{image}.{name}" if name in bare else name: parameter for name, parameter in base.items()}


def _group(component: str) -> str:
    """The image model is one, by whatever names its modules go."""
    return "image" if component in IMAGE_MODELS else component


def _image_model(paths: Iterable[str]) -> str:
    """Whose module names these are: a UNet's or a transformer's in diffusers, or those of a model's own code."""
    firsts = {path.partition(".")[0] for path in paths}
    if firsts & _UNET or (firsts and firsts <= _UNET_ALONE):
        return "unet"
    return "transformer" if firsts & _TRANSFORMER else "diffusion_model"
