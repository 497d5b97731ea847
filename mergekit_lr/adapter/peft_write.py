"""Writing an adapter as a PEFT folder: its configuration and its keys.

Every module has its own rank, alpha = scaling * rank, and names are full and anchored, so that no pattern of
one module can catch another. Shapes: LoRA A (r, d_in), B (d_out, r); convolutions unflattened; embeddings as
``lora_embedding_A`` (r, rows) and ``_B`` (width, r); experts A (E r, d_in) expert-major, B (d_out, r E)
rank-major.
"""

from __future__ import annotations

import json
import re
from collections import Counter, defaultdict
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft_carry import saved_modules
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.checkpoint.writer import write_tensors
from mergekit_lr.errors import FormatError, MismatchError, UsageError

PREFIX = "base_model.model."
# PEFT's name for an adapter that targets no module: without it an adapter of saved modules alone is refused.
NO_TARGETS = "dummy-target-modules"
_SEPARATE = 200  # keys of a pattern that stand one per module
_FLIPPED = (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_TRANSPOSED)
_STACKS = (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED)


def save(
    adapter: Adapter,
    folder: str | Path,
    *,
    dtype: torch.dtype | None = None,
    layout: Layout | None = None,
    task_type: str | None = None,
) -> None:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` into a folder.

    Args:
        adapter: What to write. Weights of rank 0 are left out; factors are written as they are, with
            alpha = scaling * rank.
        folder: An existing folder.
        dtype: What the factors are rounded to; None leaves them. Tensors in full keep their own dtype.
        layout: The base model, where it is known: ties get their factors at every end, parameters of one
            module are nested in the model's order, saved modules are checked to be whole.
        task_type: PEFT's task type, ``CAUSAL_LM`` and so on.

    Raises:
        MismatchError: The adapter names a parameter that the layout does not have.
        FormatError: A convolution of unknown kernel, or DoRA on some weights only.
    """
    weights = {name: weight for name, weight in _everywhere(adapter, layout).items() if weight.delta.rank}
    weights = _with_biases(weights)
    saved = _saved_everywhere(adapter, layout)
    carriers = {name: _carrier(name, weight, layout) for name, weight in weights.items()}
    nests: dict[str, list[str]] = defaultdict(list)  # module to its wrapped parameters, innermost first
    for name in _in_module_order(weights, layout):
        nests[_module(name)].append(name)

    tensors: dict[str, Tensor] = {}
    for nest in nests.values():
        for inner, name in enumerate(reversed(nest)):
            key = PREFIX + _path(_module(name), nests) + ".base_layer" * inner
            tensors |= {f"{key}.{part}": t for part, t in _encode(name, weights[name], dtype).items()}
    modules = _whole_modules(saved, set(nests), adapter, layout)
    base = {name: tensor for name, tensor in saved.items() if _module(name) not in modules}
    for name, tensor in saved.items():
        module, leaf = _module(name), name.rpartition(".")[2]
        wrapped = _path(module, nests) + ".base_layer" * len(nests.get(module, ()))
        tensors[PREFIX + f"{wrapped}.{leaf}".lstrip(".")] = tensor
    for name, (_, rows) in adapter.token_rows.items():
        tensors[f"{PREFIX}{_path(_module(name), nests)}.token_adapter.trainable_tokens_delta"] = rows

    config = _config(adapter, weights, carriers, modules, base, layout)
    if task_type:
        config["task_type"] = task_type
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def _everywhere(adapter: Adapter, layout: Layout | None) -> dict[str, AdaptedWeight]:
    """The weights by name, a tied one at every end of its tie in the orientation of that end."""
    if layout is None:
        return dict(adapter.weights)
    spread: dict[str, AdaptedWeight] = {}
    for name, weight in adapter.weights.items():
        if name not in layout.by_name:
            raise MismatchError(f"the base has no parameter {name}, which the adapter changes: is it another base?")
        for end in layout.ends(name):
            if end.name in adapter.weights and end.name != name:
                continue
            flip = (end.kind in _FLIPPED) != (weight.kind in _FLIPPED)
            delta = LowRank(weight.delta.B.mT, weight.delta.A.mT, weight.delta.scaling) if flip else weight.delta
            own = end.name == name
            spread[end.name] = AdaptedWeight(
                end.kind, delta, end.shape, weight.bias if own else None, weight.magnitude if own else None
            )
    return spread


def _with_biases(weights: dict[str, AdaptedWeight]) -> dict[str, AdaptedWeight]:
    """``lora_bias`` is one switch for all layers: where one has a bias, the others get a bias of zeros."""
    if all(weight.bias is None for weight in weights.values()):
        return weights
    for name, weight in weights.items():
        if weight.kind in (Kind.EMBEDDING, *_STACKS):
            raise FormatError(f"PEFT has no lora_bias for {name}, of kind {weight.kind}, and other weights have one")
    return {
        name: weight if weight.bias is not None else replace(weight, bias=weight.delta.B.new_zeros(weight.delta.shape[0]))
        for name, weight in weights.items()
    }


def _saved_everywhere(adapter: Adapter, layout: Layout | None) -> dict[str, Tensor]:
    """Tensors in full by name; a tie whose ends are all replaced as modules at every end, else once."""
    if layout is None:
        return dict(adapter.saved)
    unknown = [name for name in adapter.saved if name not in layout.by_name and name not in layout.missing]
    if unknown:
        raise MismatchError(f"the base has no parameter {unknown[0]}, which the adapter saves in full")
    targets = {end.module for name in adapter.weights for end in layout.ends(name)}
    known = [name for name in adapter.saved if name in layout.by_name]
    modules = saved_modules(layout, known, targets)
    saved = dict(adapter.saved)
    for name in known:
        for end in layout.ends(name):
            if end.module in modules:
                saved.setdefault(end.name, adapter.saved[name])
    return saved


def _whole_modules(
    saved: dict[str, Tensor], targets: set[str], adapter: Adapter, layout: Layout | None
) -> tuple[str, ...]:
    if layout is not None:
        return saved_modules(layout, [name for name in saved if name in layout.by_name], targets)
    # Without the model: a module of which there is more than a bias, as far as one can see.
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in saved:
        leaves[_module(name)].add(name.rpartition(".")[2])
    return tuple(m for m, names in leaves.items() if m and m not in targets and names != {"bias"})


def _carrier(name: str, weight: AdaptedWeight, layout: Layout | None) -> str:
    if layout is not None:
        parameter: Parameter = layout.by_name[name]
        if not parameter.carrier:
            raise UsageError(
                f"PEFT cannot put factors on {name}: {parameter.obstacle or parameter.kind}; save it in full"
            )
        return parameter.carrier
    return "module" if name.endswith(".weight") and weight.kind not in _STACKS else "parameter"


def _in_module_order(weights: dict[str, AdaptedWeight], layout: Layout | None) -> list[str]:
    """PEFT nests wrappers in the order in which a module registers its parameters, the first innermost."""
    if layout is None:
        return sorted(weights, key=lambda name: (_module(name), "down" in name.rpartition(".")[2]))
    return [name for name in layout.by_name if name in weights]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _path(module: str, nests: dict[str, list[str]]) -> str:
    """A module's path in the wrapped model: every wrapped ancestor keeps its children in ``base_layer``."""
    parts, path, seen = module.split("."), "", ""
    for index, part in enumerate(parts):
        seen = f"{seen}.{part}".lstrip(".")
        path = f"{path}.{part}".lstrip(".")
        if index < len(parts) - 1:
            path += ".base_layer" * len(nests.get(seen, ()))
    return path


def _encode(name: str, weight: AdaptedWeight, dtype: torch.dtype | None) -> dict[str, Tensor]:
    """The tensors of one LoRA layer by the last part of their key."""
    A, B = weight.delta.A.to(dtype=dtype), weight.delta.B.to(dtype=dtype)
    if weight.kind is Kind.EMBEDDING:
        parts = {"lora_embedding_A": A, "lora_embedding_B": B}
    else:
        if weight.kind in _STACKS:
            A, B = A.flatten(0, 1), B.permute(1, 2, 0).flatten(1, 2)
        elif weight.kind is Kind.CONVOLUTION:
            if weight.shape is None:
                raise FormatError(f"the kernel of the convolution {name} is not known: its shape is needed")
            A = A.reshape(-1, *weight.shape[1:])
            B = B.reshape(*B.shape, *(1 for _ in weight.shape[2:]))
        parts = {"lora_A.weight": A, "lora_B.weight": B}
    if weight.bias is not None:
        parts["lora_B.bias"] = weight.bias.to(dtype=dtype)
    if weight.magnitude is not None:
        parts["lora_magnitude_vector"] = weight.magnitude.to(dtype=dtype)
    return parts


def _config(
    adapter: Adapter,
    weights: dict[str, AdaptedWeight],
    carriers: dict[str, str],
    modules: tuple[str, ...],
    base: dict[str, Tensor],
    layout: Layout | None,
) -> dict[str, Any]:
    """PEFT's configuration; the fields of the source that this module does not speak of are kept."""
    names = {name: _module(name) if carriers[name] == "module" else name for name in weights}
    ranks = {names[name]: weight.delta.rank for name, weight in weights.items()}
    alphas = {names[name]: _number(weight.delta.scaling * weight.delta.rank) for name, weight in weights.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    targets = [_module(name) for name in weights if carriers[name] == "module"]
    parameters = [name for name in weights if carriers[name] == "parameter"]
    dora = [weight.magnitude is not None for weight in weights.values()]
    if any(dora) and not all(dora):
        raise FormatError("PEFT has DoRA on all weights or on none: some of the adapter's have no magnitude")
    indices = {_module(name): list(rows[0]) for name, rows in adapter.token_rows.items()}
    kept = {key: value for key, value in adapter.config.items() if key not in ("notes",)}
    return kept | {
        "peft_type": "LORA",
        "base_model_name_or_path": adapter.base,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "target_modules": _targets(targets, layout) or ([] if parameters else NO_TARGETS),
        "target_parameters": parameters or None,
        "modules_to_save": list(modules) or None,
        "trainable_token_indices": indices or None,
        "fan_in_fan_out": any(weight.kind is Kind.TRANSPOSED for weight in weights.values()),
        # Said also of parameters that are no biases: PEFT then keeps a second adapter off the changed base.
        "bias": "all" if base else "none",
        "lora_bias": any(weight.bias is not None for weight in weights.values()),
        "use_dora": any(dora),
        "use_rslora": False,
        "init_lora_weights": True,
        "inference_mode": True,
        "lora_dropout": 0.0,
        "exclude_modules": None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "layer_replication": None,
    }


def _patterns(values: dict[str, Any], default: Any) -> dict[str, Any]:
    """Values that differ from the default under anchored names, so that no order of the keys matters.

    PEFT matches ``(.*\\.)?(KEY)$`` and takes the first key that fits; ``proj_out`` alone would catch
    ``blocks.0.proj_out`` too. It tries every key on every module, and Python keeps 512 compiled patterns:
    beyond that, loading takes minutes, so modules of one value then share a key.
    """
    named = {name: value for name, value in values.items() if value != default}
    if len(named) <= _SEPARATE:
        return {f"^{re.escape(name)}": named[name] for name in sorted(named, key=lambda name: (-len(name), name))}
    groups: dict[Any, list[str]] = defaultdict(list)
    for name, value in named.items():
        groups[value].append(re.escape(name))
    return {f"^(?:{'|'.join(group)})": value for value, group in groups.items()}


def _targets(targets: list[str], layout: Layout | None) -> list[str] | str:
    """Full names; one exact pattern where a name is also the end of another module's (Flux: ``proj_out``)."""
    modules = layout.modules if layout is not None else frozenset(targets)
    wanted = set(targets)
    ends = {".".join(module.split(".")[cut:]) for module in modules - wanted for cut in range(1, module.count(".") + 1)}
    if wanted & ends:
        return "|".join(re.escape(target) for target in targets)
    return targets


def _number(value: float) -> float | int:
    return int(value) if float(value).is_integer() else value
