"""Writing an adapter as a PEFT folder: its configuration and its keys.

Every module has its own rank, alpha = scaling * rank, and names are full and anchored, so that no pattern of
one module can catch another. Shapes: LoRA A (r, d_in), B (d_out, r); convolutions unflattened; embeddings as
``lora_embedding_A`` (r, rows) and ``_B`` (width, r); experts A (E r, d_in) expert-major, B (d_out, r E)
rank-major.
"""

from __future__ import annotations

import json
from collections import defaultdict
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft_carry import saved_modules
from mergekit_lr.adapter.peft_config import configuration, module_of
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.checkpoint.writer import write_tensors
from mergekit_lr.errors import FormatError, MismatchError, UsageError

PREFIX = "base_model.model."
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
        UsageError: A change that is no product of factors.
    """
    if adapter.added:
        raise UsageError(
            f"{min(adapter.added)}: its change is no product of factors; decompose it first (lrmerge convert --to peft "
            "with --rank, --energy or --error)"
        )
    weights = {name: weight for name, weight in at_every_end(adapter, layout).items() if weight.delta.rank}
    weights = _with_biases(weights)
    saved = _saved_everywhere(adapter, layout)
    carriers = {name: _carrier(name, weight, layout) for name, weight in weights.items()}
    nests: dict[str, list[str]] = defaultdict(list)  # module to its wrapped parameters, innermost first
    for name in _in_module_order(weights, layout):
        nests[module_of(name)].append(name)

    tensors: dict[str, Tensor] = {}
    for nest in nests.values():
        for inner, name in enumerate(reversed(nest)):
            key = PREFIX + _path(module_of(name), nests) + ".base_layer" * inner
            tensors |= {f"{key}.{part}": t for part, t in _encode(name, weights[name], dtype).items()}
    modules = _whole_modules(saved, set(nests), adapter, layout)
    base = [name for name in saved if module_of(name) not in modules]
    for name, tensor in saved.items():
        module, leaf = module_of(name), name.rpartition(".")[2]
        wrapped = _path(module, nests) + ".base_layer" * len(nests.get(module, ()))
        tensors[PREFIX + f"{wrapped}.{leaf}".lstrip(".")] = tensor
    for name, (_, rows) in adapter.token_rows.items():
        tensors[f"{PREFIX}{_path(module_of(name), nests)}.token_adapter.trainable_tokens_delta"] = rows

    config = configuration(
        adapter, weights, carriers, modules=modules, into_base=bool(base), layout=layout, task_type=task_type
    )
    folder = Path(folder)
    write_tensors(folder / "adapter_model.safetensors", tensors)
    (folder / "adapter_config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")


def at_every_end(adapter: Adapter, layout: Layout | None) -> dict[str, AdaptedWeight]:
    """The weights by name, the source of a tie at every end of it in the orientation of that end.

    Raises:
        MismatchError: The adapter names a parameter that the layout does not have.
    """
    if layout is None:
        return dict(adapter.weights)
    spread: dict[str, AdaptedWeight] = {}
    for name, weight in adapter.weights.items():
        if name not in layout.by_name:
            raise MismatchError(f"the base has no parameter {name}, which the adapter changes: is it another base?")
        for end in layout.ends(name):
            if end.name in adapter.weights and end.name != name:
                continue
            flip = end.kind.turned != weight.kind.turned
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
    zeros = {name: weight.delta.B.new_zeros(weight.delta.shape[0]) for name, weight in weights.items()}
    return {
        name: weight if weight.bias is not None else replace(weight, bias=zeros[name])
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
    if "modules_to_save" in adapter.config:  # from a file: the rest of what it saved in full goes into the base
        modules = tuple(adapter.config["modules_to_save"] or ())
        found = dict.fromkeys(module_of(name) for name in saved)
        return tuple(m for m in found if m and m not in targets and m.endswith(modules))
    # Without the model: a module of which there is more than a bias, as far as one can see.
    leaves: dict[str, set[str]] = defaultdict(set)
    for name in saved:
        leaves[module_of(name)].add(name.rpartition(".")[2])
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
        return sorted(weights, key=lambda name: (module_of(name), "down" in name.rpartition(".")[2]))
    return [name for name in layout.by_name if name in weights]


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
