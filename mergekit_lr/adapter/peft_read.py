"""Reading a PEFT folder: keys back to parameters, the configuration's patterns to one rank and scale per weight."""

from __future__ import annotations

import json
import math
import re
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.hub import split_ref
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError

# module, nesting of base_layer, part of the LoRA layer; an adapter's name may stand behind the part.
_LORA = re.compile(
    r"(?P<module>.+?)(?P<nest>(\.base_layer)*)\."
    r"(?P<part>lora_A|lora_B|lora_embedding_A|lora_embedding_B|lora_magnitude_vector)"
    r"(\.(?!weight$|bias$)[^.]+)?(\.(?P<leaf>weight|bias))?"
)
_TOKENS = ".token_adapter.trainable_tokens_delta"
# What makes the delta something else than scaling * B @ A; each is refused by name.
_FOREIGN = ("kasa_config", "use_bdlora", "arrow_config", "layer_replication")
# Initialisations that take something away from the base: their factors fit that residual base alone.
_RESIDUAL = ("pissa", "olora", "corda", "lora_ga", "loftq", "mica")
_HELD = {  # fields whose content the adapter holds otherwise
    "peft_type", "base_model_name_or_path", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "target_modules",
    "target_parameters", "trainable_token_indices", "fan_in_fan_out", "bias", "lora_bias", "use_dora", "use_rslora",
    "revision",
}  # fmt: skip


def open_peft(folder: str | Path, *, layout: Layout | None = None) -> Adapter:
    """Read an adapter folder.

    Args:
        folder: With ``adapter_config.json`` and ``adapter_model.safetensors``.
        layout: The base model, where it is known: kinds and shapes are then its own. Without it they come from
            the file; which of two stacks of experts is which, from their shapes.

    Returns:
        The adapter, scalings resolved per weight. ``config["notes"]`` says what a reader should know.

    Raises:
        FormatError: Not a LoRA adapter, a variant whose delta is no product of factors, factors that do not
            fit together, or a key that belongs to none.
    """
    folder = Path(folder)
    config = _read_config(folder / "adapter_config.json")
    layers: dict[str, dict[int, dict[str, Tensor]]] = defaultdict(lambda: defaultdict(dict))
    saved: dict[str, Tensor] = {}
    rows: dict[str, tuple[list[int], Tensor]] = {}
    for key, tensor in _read_tensors(folder / "adapter_model.safetensors").items():
        name = key.removeprefix("base_model.model.")
        if match := _LORA.fullmatch(name):
            part = match["part"] + (".bias" if match["leaf"] == "bias" else "")
            layers[_plain(match["module"])][match["nest"].count(".")][part] = tensor
        elif name.endswith(_TOKENS):
            module = _plain(name.removesuffix(_TOKENS))
            rows[f"{module}.weight"] = (_indices(config, module, folder), tensor)
        else:
            saved[_plain(name)] = tensor
    weights: dict[str, AdaptedWeight] = {}
    for module, nest in layers.items():
        # The wrapper nearest to the module has the most base_layers in its key.
        stack = [nest[depth] for depth in sorted(nest, reverse=True)]
        for name, parts in zip(_names(module, stack, config, layout), stack, strict=True):
            weights[name] = _weight(name, parts, config, layout)
    notes = list(_notes(config))
    kept = {key: value for key, value in config.items() if key not in _HELD}
    return Adapter(
        weights,
        saved,
        rows,
        base=_base(config),
        config=kept | ({"notes": notes} if notes else {}),
    )


def _base(config: Mapping[str, Any]) -> str | None:
    """What the adapter is for, ``org/name@revision`` where the revision stands apart."""
    base, revision = config.get("base_model_name_or_path"), config.get("revision")
    return f"{base}@{revision}" if base and revision and not split_ref(base)[1] else base


def _read_config(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(path.read_text())
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; a PEFT adapter has one") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as problem:
        raise FormatError(f"{path}: not JSON: {problem}") from problem
    if not isinstance(config, dict) or str(config.get("peft_type", "")).upper() != "LORA":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise FormatError(f"{path}: peft_type is {found}, expected LORA")
    for key in _FOREIGN:
        if config.get(key):
            raise FormatError(f"{path}: {key} is set, so the delta is not the product of the factors in the file")
    return config


def _read_tensors(path: Path) -> dict[str, Tensor]:
    try:
        return load_file(path)
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; a PEFT adapter has one") from None
    except SafetensorError as problem:
        raise FormatError(f"{path}: {problem}") from problem


def _plain(name: str) -> str:
    """A path without what PEFT puts into it when it wraps modules."""
    return re.sub(r"\.(base_layer|original_module|modules_to_save\.[^.]+)(?=\.|$)", "", name)


def _names(module: str, stack: list[dict[str, Tensor]], config: dict[str, Any], layout: Layout | None) -> list[str]:
    """Names of the parameters that the LoRA layers of one module change, innermost first."""
    wrapped = config.get("target_parameters") or []
    if layout is not None:
        found = [p.name for p in layout.by_name.values() if p.module == module and _ends(p.name, wrapped)]
        if not found:
            # A LoRA on nn.MultiheadAttention changes its fused projection.
            names = [f"{module}.weight", f"{module}.in_proj_weight"]
            found = [name for name in names if name in layout.by_name][:1]
    else:
        leaves = [name.rpartition(".")[2] for name in wrapped if _ends(module, [name.rpartition(".")[0]])]
        found = [f"{module}.{leaf}" for leaf in sorted(set(leaves))]
        if len(stack) == 1 and (_targeted(module, config) or not found):
            found = [f"{module}.weight"]
        elif len(stack) == 2 == len(found):
            found.sort(key=lambda name: "down" in name.rpartition(".")[2])
            # Down projects back to what gate and up start from.
            if stack[0]["lora_B"].shape[0] == stack[1]["lora_A"].shape[1] != stack[1]["lora_B"].shape[0]:
                found.reverse()
    if len(found) != len(stack):
        raise FormatError(
            f"{module}: {len(stack)} LoRA layers in the file, {len(found)} parameters of it in target_parameters"
            + ("" if layout is None else " and in the base")
        )
    return found


def _ends(name: str, endings: list[str]) -> bool:
    return any(name == end or name.endswith(f".{end}") or not end for end in endings)


def _targeted(module: str, config: dict[str, Any]) -> bool:
    targets = config.get("target_modules") or []
    if isinstance(targets, str):
        return targets.lower() == "all-linear" or re.fullmatch(targets, module) is not None
    return _ends(module, targets)


def _weight(name: str, parts: dict[str, Tensor], config: dict[str, Any], layout: Layout | None) -> AdaptedWeight:
    """One LoRA layer as factors in linear layout with its scaling."""
    table = "lora_embedding_A" in parts
    A, B = (parts.get(f"lora_embedding_{x}" if table else f"lora_{x}") for x in "AB")
    if A is None or B is None:
        raise FormatError(f"{name}: the adapter has {' and '.join(sorted(parts))}, expected both factors")
    known = layout.by_name.get(name) if layout is not None else None
    by_name = name if _wraps(name, config) else name.rpartition(".")[0]
    rank = _pattern(config.get("rank_pattern"), by_name, config.get("r", 8))
    alpha = _pattern(config.get("alpha_pattern"), by_name, config.get("lora_alpha", 8))
    shape = known.shape if known is not None else None
    if rank <= 0 or A.shape[0] % rank or A.shape[0] != B.shape[1]:
        raise FormatError(f"{name}: A {list(A.shape)}, B {list(B.shape)} and rank {rank} of the config do not fit")
    if table:
        kind = Kind.EMBEDDING
    elif A.ndim > 2:
        kind = Kind.CONVOLUTION
        shape = (B.shape[0], *A.shape[1:])
        if known is not None and known.shape != shape:
            raise FormatError(f"{name}: factors of a convolution {list(shape)}, the base has {list(known.shape)}")
        A, B = A.flatten(1), B.flatten(1)
    elif _wraps(name, config) and not name.endswith(".weight"):
        kind = Kind.EXPERTS
        experts = A.shape[0] // rank
        A, B = A.reshape(experts, rank, -1), B.reshape(B.shape[0], rank, experts).permute(2, 0, 1)
    else:
        kind = Kind.TRANSPOSED if config.get("fan_in_fan_out") else Kind.LINEAR
    if A.shape[-2] != rank:
        raise FormatError(f"{name}: the factors have rank {A.shape[-2]}, the config says {rank}")
    scaling = alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)
    return AdaptedWeight(
        known.kind if known is not None else kind,
        LowRank(A, B, scaling),
        shape,
        parts.get("lora_B.bias"),
        parts.get("lora_magnitude_vector"),
    )


def _wraps(name: str, config: dict[str, Any]) -> bool:
    """Whether the LoRA is on the parameter: PEFT then matches patterns with the parameter's own name."""
    return _ends(name, config.get("target_parameters") or [])


def _pattern(patterns: dict[str, Any] | None, name: str, default: Any) -> Any:
    """PEFT's rule: the first key, in the file's order, that matches the end of the name at a dot."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return default


def _indices(config: dict[str, Any], module: str, folder: Path) -> list[int]:
    indices = config.get("trainable_token_indices")
    if isinstance(indices, dict):
        indices = next((value for key, value in indices.items() if _ends(module, [key])), None)
    if not isinstance(indices, list):
        raise FormatError(f"{folder}: rows of {module} in the file, but no trainable_token_indices for it")
    return [int(index) for index in indices]


def _notes(config: dict[str, Any]) -> Iterator[str]:
    start = config.get("init_lora_weights")
    if isinstance(start, str) and start.lower().startswith(_RESIDUAL):
        yield (
            f"init_lora_weights is {start}: the factors are relative to the residual base of that initialisation, "
            "not to the base itself, unless they were converted on saving"
        )
    if config.get("alora_invocation_tokens"):
        yield "an activated LoRA: it acts only behind its invocation tokens, its delta here acts everywhere"
