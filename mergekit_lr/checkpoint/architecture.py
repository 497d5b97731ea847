"""A layout from the model's own code: built on the meta device, its names, kinds and conversions read off it.

transformers renames tensors when it loads them and joins or cuts some (one tensor per expert into one stack).
Its own conversion mapping is followed here key by key, as its loader does, but on names and shapes only: each
conversion that is a joining or cutting becomes ``Block`` lists. Custom code of a checkpoint is never run.
"""

from __future__ import annotations

import contextlib
from collections import defaultdict
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import nn

from mergekit_lr.checkpoint.layout_use import bypassed
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter

Shapes = dict[str, tuple[int, ...]]
Blocks = tuple[tuple[Block, ...], ...]


class Unbuildable(Exception):
    """The installed library cannot build this model; the message says why in a few words."""


class _Sources(NamedTuple):
    """What makes one parameter: ``blocks`` joined along ``join``; ``problem`` when it cannot be said so."""

    blocks: Blocks
    join: int = 0
    problem: str = ""


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
    sources, unused = _follow(shapes, model, mapping)
    # PEFT takes a target of one of these names for an expert's, wherever it stands, and looks for it in the
    # stack; such a linear layer is targeted by its parameter instead.
    fused = {
        pattern.removesuffix(".weight").rpartition(".")[2]
        for entry in mapping
        if isinstance(entry, WeightConverter) and _operations(entry)[:1] == ["MergeModulelist"]
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
    sources = {name: _whole(name, shapes) for name in shapes if name in known}
    return _fields(model, sources, unused, {}, set())


def _build_transformers(config: dict[str, Any]) -> Any:
    import transformers
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    model_type = config["model_type"]
    if model_type not in CONFIG_MAPPING:
        raise Unbuildable(f"transformers {transformers.__version__} knows no model type {model_type}")
    with _building(model_type):
        settings = CONFIG_MAPPING[model_type].from_dict(
            {key: value for key, value in config.items() if key not in ("auto_map", "quantization_config")}
        )
        settings._attn_implementation = "eager"
        name = (config.get("architectures") or [None])[0]
        kind = getattr(transformers, name, None) if name else None
        return kind(settings) if kind else transformers.AutoModel.from_config(settings)


@contextlib.contextmanager
def _building(what: str) -> Iterator[None]:
    """Build on the meta device in silence; whatever a constructor makes of a foreign config is one answer."""
    with _silence(), torch.device("meta"):
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError, ImportError, RuntimeError) as problem:
            first = (str(problem).splitlines() or [""])[0][:120]
            raise Unbuildable(f"{what} cannot be built here: {type(problem).__name__} {first}") from problem


@contextlib.contextmanager
def _silence() -> Iterator[None]:
    from transformers.utils import logging

    before = logging.get_verbosity()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _whole(name: str, shapes: Shapes) -> _Sources:
    return _Sources(((Block(name),),))


def _operations(converter: Any) -> list[str]:
    return [type(operation).__name__ for operation in converter.operations]


def _follow(shapes: Shapes, model: Any, mapping: list[Any]) -> tuple[dict[str, _Sources], dict[str, str]]:
    """Every tensor on disk through the loader's renaming, the tensors of a conversion together."""
    from transformers.core_model_loading import WeightConverter, WeightRenaming, dot_natural_key, rename_source_key

    state = model.state_dict()
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: entry for entry in converters for pattern in entry.source_patterns}
    sources: dict[str, _Sources] = {}
    unused: dict[str, str] = {}
    grouped: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(shapes, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, model.base_model_prefix, state)
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], model.base_model_prefix, state)
        if target not in state:
            unused[name] = f"no parameter of {type(model).__name__}"
        elif pattern is None:
            sources[target] = _whole(name, shapes)
        else:
            grouped[target][pattern].append(name)
    for target, collected in grouped.items():
        converter = by_pattern[next(iter(collected))]
        made = _convert(target, collected, converter, shapes, state)
        if made is None:
            reason = f"loaded through {' and '.join(_operations(converter))}, which no joining of tensors describes"
            unused |= {name: reason for names in collected.values() for name in names}
        else:
            sources |= made
    return sources, unused


def _convert(
    target: str, collected: dict[str, list[str]], converter: Any, shapes: Shapes, state: dict[str, Any]
) -> dict[str, _Sources] | None:
    """One conversion as blocks, or None where its operations are no joining or cutting along an axis."""
    lists = [collected[pattern] for pattern in converter.source_patterns if pattern in collected]
    match _operations(converter), converter.operations:
        case ["MergeModulelist"], [merge] if merge.dim == 0 and len(lists) == 1:
            return {target: _Sources(tuple((Block(name),) for name in lists[0]))}
        case ["MergeModulelist", "Concatenate"], [merge, join] if merge.dim == 0 and join.dim > 0:
            if len({len(names) for names in lists}) == 1:
                rows = tuple(tuple(Block(name) for name in names) for names in zip(*lists, strict=True))
                return {target: _Sources(rows, join.dim - 1)}
        case ["Concatenate"], [join] if len(lists) > 1:
            return {target: _Sources((tuple(Block(name) for names in lists for name in names),), join.dim)}
        case ["Chunk" | "Split"], [cut] if cut.dim == 0 and len(lists) == 1 and len(lists[0]) == 1:
            name, start, made = lists[0][0], 0, {}
            first = converter.target_patterns[0]
            for pattern in converter.target_patterns:
                part = target.replace(first, pattern)
                if part not in state:
                    return None
                stop = start + state[part].shape[0]
                made[part] = _Sources(((Block(name, rows=(start, stop)),),))
                start = stop
            return made if start == shapes[name][0] else None
    return None


def _fields(
    model: nn.Module, sources: dict[str, _Sources], unused: dict[str, str], ties: dict[str, str], fused: set[str]
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
        kind, carrier, obstacle = _kind(owners[module], leaf, tuple(tensor.shape), fused)
        if carrier and module in misses:
            carrier, obstacle = "", misses[module]
        made = sources[source]
        if len(made.blocks) == 1 and kind in (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED):
            made = _Sources(tuple((Block(made.blocks[0][0].tensor, expert),) for expert in range(tensor.shape[0])))
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


def _kind(owner: nn.Module, leaf: str, shape: tuple[int, ...], fused: set[str]) -> tuple[Kind, str, str]:
    """Kind, carrier and obstacle of the parameter ``leaf`` of a module, by the module's class."""
    if len(shape) < 2:
        return Kind.VECTOR, "", ""
    if leaf == "weight":
        match owner:
            case nn.Linear():
                return Kind.LINEAR, *_if(
                    _forward_of(owner, nn.Linear), "module", "a linear layer with a forward of its own"
                )
            case nn.Embedding():
                plain = _forward_of(owner, nn.Embedding) or hasattr(owner, "embed_scale")
                return Kind.EMBEDDING, *_if(plain, "module", "a table with a forward of its own")
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                # PEFT copies kernel, stride and padding, and nothing else.
                plain = owner.groups == 1 and set(owner.dilation) == {1} and owner.padding_mode == "zeros"
                plain = plain and type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d)
                return Kind.CONVOLUTION, *_if(plain, "module", "a convolution in groups or with dilation")
        if type(owner).__name__ == "Conv1D" and type(owner).__module__.startswith("transformers"):
            return Kind.TRANSPOSED, "module", ""
    if len(shape) == 3 and getattr(owner, "num_experts", None) == shape[0]:
        transposed = getattr(owner, "is_transposed", False)
        return Kind.EXPERTS_TRANSPOSED if transposed else Kind.EXPERTS, "parameter", ""
    return Kind.OTHER, "", ""


def _if(plain: bool, carrier: str, obstacle: str) -> tuple[str, str]:
    return (carrier, "") if plain else ("", obstacle)


def _forward_of(owner: nn.Module, kind: type[nn.Module]) -> bool:
    return type(owner).forward is kind.forward
