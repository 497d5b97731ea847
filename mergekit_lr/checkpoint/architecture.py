"""A layout from the model's own code: built on the meta device, its names, kinds and conversions read off it.

transformers renames tensors when it loads them and joins or cuts some (one tensor per expert into one stack).
Its own conversion mapping is followed here key by key, as its loader does, but on names and shapes only: each
conversion that is a joining or cutting becomes ``Block`` lists. Custom code of a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
import logging
import warnings
from collections import defaultdict
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from mergekit_lr.checkpoint.layout_conversion import Shapes, Sources, follow, operations, whole
from mergekit_lr.checkpoint.layout_kind import kind_of
from mergekit_lr.checkpoint.layout_use import bypassed
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter


class Unbuildable(Exception):
    """The installed library cannot build this model; the message says why in a few words."""


def from_transformers(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ``Layout`` from a transformers model.

    Args:
        shapes: Tensor name on disk to its shape.
        config: Content of ``config.json`` with a ``model_type``.

    Raises:
        Unbuildable: transformers does not know the model, or cannot build it from this config.
    """
    from transformers.conversion_mapping import get_model_conversion_mapping
    from transformers.core_model_loading import WeightConverter

    with _silence():
        model = _build_transformers(config)
        mapping = get_model_conversion_mapping(model)
    sources, unused = follow(shapes, model, mapping)
    state = model.state_dict()
    for target, made in list(sources.items()):
        block = made.blocks[0][0]
        if made == whole(block.tensor) and shapes[block.tensor] != tuple(state[target].shape):
            found, expected = list(shapes[block.tensor]), list(state[target].shape)
            unused[block.tensor] = f"its shape is {found}, the config makes {target} {expected}"
            del sources[target]
    if 2 * len(unused) > len(shapes):
        raise Unbuildable(f"{len(unused)} of {len(shapes)} tensors fit no parameter of {type(model).__name__}")
    # PEFT takes a target of one of these names for an expert's, wherever it stands, and looks for it in the
    # stack; such a linear layer is targeted by its parameter instead.
    fused = {
        pattern.removesuffix(".weight").rpartition(".")[2]
        for entry in mapping
        if isinstance(entry, WeightConverter) and operations(entry)[:1] == ["MergeModulelist"]
        for pattern in entry.source_patterns
    }
    return _fields(model, sources, unused, dict(model.all_tied_weights_keys), fused | {"gate"} if fused else set())


def from_diffusers(shapes: Shapes, config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ``Layout`` from a diffusers model: names on disk and in memory are the same.

    Raises:
        Unbuildable: diffusers does not know the class, or cannot build it from this config.
    """
    import diffusers

    kind = getattr(diffusers, config["_class_name"], None)
    if kind is None or not hasattr(kind, "from_config"):
        raise Unbuildable(f"diffusers knows no {config['_class_name']}")
    with _building(config["_class_name"]):
        model = kind.from_config({key: value for key, value in config.items() if key != "auto_map"})
    known = set(model.state_dict())
    unused = {name: f"no parameter of {kind.__name__}" for name in shapes if name not in known}
    sources = {name: whole(name) for name in shapes if name in known}
    return _fields(model, sources, unused, {}, set())


def _build_transformers(config: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise Unbuildable(f"transformers {transformers.__version__} knows no model type {model_type}")
    with _building(model_type):
        settings = CONFIG_MAPPING[model_type].from_dict(
            {key: _floats(value) for key, value in config.items() if key not in ("auto_map", "quantization_config")}
        )
        settings._attn_implementation = "eager"
        name = (config.get("architectures") or [None])[0]
        kind = getattr(transformers, name, None) if name else None
        return kind(settings) if kind else transformers.AutoModel.from_config(settings)


def _floats(value: Any) -> Any:
    """transformers writes infinities as ``{"__float__": "Infinity"}``, since JSON has none."""
    if isinstance(value, dict):
        tagged = value.get("__float__")
        return float(tagged) if tagged is not None else {key: _floats(inner) for key, inner in value.items()}
    return [_floats(inner) for inner in value] if isinstance(value, list) else value


@contextlib.contextmanager
def _building(what: str) -> Iterator[None]:
    """Build on the meta device in silence; whatever a constructor makes of a foreign config is one answer."""
    from huggingface_hub.errors import StrictDataclassError  # takes 0.2 s, and a plain decoder never gets here

    foreign = (StrictDataclassError, ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError)
    try:
        with _silence(), torch.device("meta"):
            yield
    except foreign as problem:
        first = (str(problem).splitlines() or [""])[0][:120]
        raise Unbuildable(f"{what} cannot be built here: {type(problem).__name__} {first}") from problem


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    """Nothing below an error from the libraries, which warn of odd configs that are not ours to mend."""
    loggers = [logging.getLogger(name) for name in ("transformers", "diffusers")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)


def _fields(
    model: nn.Module, sources: dict[str, Sources], unused: dict[str, str], ties: dict[str, str], fused: set[str]
) -> dict[str, Any]:
    """Kinds and carriers from the modules, and what is tied, missing or of another shape than expected."""
    misses = bypassed(model)
    owners = dict(model.named_modules(remove_duplicate=False))
    state = model.state_dict()
    found: dict[str, Parameter] = {}
    tied: list[tuple[str, Parameter]] = []
    missing: list[str] = []
    # A tie holds whichever of its ends is on disk, and is none where both are: then values decide.
    groups = _tie_groups(model, ties)
    for name, tensor in state.items():
        source = next((end for end in (name, *groups.get(name, ())) if end in sources), None)
        if source is None:
            missing.append(name)
            continue
        module, _, leaf = name.rpartition(".")
        kind, carrier, obstacle = kind_of(owners[module], leaf, tuple(tensor.shape))
        if carrier == "module" and module.rpartition(".")[2] in fused:
            carrier = "parameter"
        if carrier and module in misses:
            carrier, obstacle = "", misses[module]
        made = sources[source]
        if len(made.blocks) == 1 and kind in (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED):
            made = Sources(tuple((Block(made.blocks[0][0].tensor, expert),) for expert in range(tensor.shape[0])))
        shape = tuple(tensor.shape)
        parameter = Parameter(name, kind, shape, made.blocks, made.join, carrier, obstacle)
        if source == name:
            found[name] = parameter
        else:
            tied.append((source, parameter))
    return {
        "parameters": tuple(found.values()),
        "tied": tuple(parameter for _, parameter in tied),
        "ties": {parameter.name: source for source, parameter in tied},
        "unused": unused,
        "missing": tuple(missing),
    }


def _tie_groups(model: nn.Module, ties: dict[str, str]) -> dict[str, tuple[str, ...]]:
    """Every tied name to the other names of its tensor: the library's own ties and modules held twice."""
    groups: dict[str, set[str]] = defaultdict(set)
    for target, source in ties.items():
        groups[source] |= {source, target}
    shared: dict[int, set[str]] = defaultdict(set)
    for name, tensor in model.named_parameters(remove_duplicate=False):
        shared[id(tensor)].add(name)
    names = [*groups.values(), *(names for names in shared.values() if len(names) > 1)]
    return {name: tuple(sorted(group - {name})) for group in names for name in group}
