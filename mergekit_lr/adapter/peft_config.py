"""The ``adapter_config.json`` of an adapter: what PEFT is to target, at which rank and scale, and nothing besides."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from typing import Any

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.checkpoint.hub import split_ref
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError

# PEFT's name for an adapter that targets no module: without it an adapter of saved modules alone is refused.
NO_TARGETS = "dummy-target-modules"
_SEPARATE = 200  # keys of a pattern that stand one per module
# With these task types PEFT replaces every module whose path ends so, and wants its tensors in the file.
_HEADS = {
    "SEQ_CLS": ("classifier", "score"),
    "TOKEN_CLS": ("classifier", "score"),
    "QUESTION_ANS": ("qa_outputs",),
}


def module_of(name: str) -> str:
    """Path of the module that owns the parameter ``name``."""
    return name.rpartition(".")[0]


def configuration(
    adapter: Adapter,
    weights: dict[str, AdaptedWeight],
    carriers: dict[str, str],
    *,
    modules: tuple[str, ...],
    into_base: bool,
    layout: Layout | None,
    task_type: str | None,
) -> dict[str, Any]:
    """PEFT's configuration; the fields of the source that this module does not speak of are kept.

    Args:
        adapter: What is written; its own config and base are carried over.
        weights: Every weight that gets factors, at every end of its tie, by name.
        carriers: For each of them "module" or "parameter", see ``Parameter.carrier``.
        modules: Modules that are replaced whole.
        into_base: Whether any tensor is loaded into the base itself.
        layout: The base model, where it is known.
        task_type: PEFT's task type; left out where PEFT would ask for more than the file holds.

    Raises:
        FormatError: DoRA on some weights only, or a Conv1D beside a LoRA on a parameter.
    """
    names = {name: module_of(name) if carriers[name] == "module" else name for name in weights}
    ranks = {names[name]: weight.delta.rank for name, weight in weights.items()}
    alphas = {names[name]: _number(weight.delta.scaling * weight.delta.rank) for name, weight in weights.items()}
    rank = Counter(ranks.values()).most_common(1)[0][0] if ranks else 8
    alpha = Counter(alphas.values()).most_common(1)[0][0] if alphas else 8
    targets = [module_of(name) for name in weights if carriers[name] == "module"]
    parameters = [name for name in weights if carriers[name] == "parameter"]
    dora = [weight.magnitude is not None for weight in weights.values()]
    if any(dora) and not all(dora):
        raise FormatError("PEFT has DoRA on all weights or on none: some of the adapter's have no magnitude")
    transposed = [name for name, weight in weights.items() if weight.kind is Kind.TRANSPOSED]
    if parameters and transposed:
        raise FormatError(
            f"PEFT has no LoRA on a Conv1D ({transposed[0]}) in one adapter with a LoRA on a parameter "
            f"({parameters[0]}); save one of them in full"
        )
    indices = {module_of(name): list(rows[0]) for name, rows in adapter.token_rows.items()}
    kept = {key: value for key, value in adapter.config.items() if key != "notes"}
    if task_type:
        kept["task_type"] = task_type
    kept["task_type"] = _task(kept.get("task_type"), modules, layout)
    base, revision = split_ref(adapter.base or "")
    return kept | {
        "peft_type": "LORA",
        "base_model_name_or_path": base or None,
        "revision": revision,
        "r": rank,
        "lora_alpha": alpha,
        "rank_pattern": _patterns(ranks, rank),
        "alpha_pattern": _patterns(alphas, alpha),
        "target_modules": _targets(targets, layout) or ([] if parameters else NO_TARGETS),
        "target_parameters": parameters or None,
        "modules_to_save": list(modules) or None,
        "trainable_token_indices": indices or None,
        "fan_in_fan_out": bool(transposed),
        # Said also of parameters that are no biases: PEFT then keeps a second adapter off the changed base.
        "bias": "all" if into_base else "none",
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


def _task(task_type: str | None, modules: tuple[str, ...], layout: Layout | None) -> str | None:
    """The task type, or None where the class that PEFT picks by it would not do with what is there."""
    if layout is None:
        return task_type
    if task_type == "SEQ_2_SEQ_LM":
        # That class feeds token ids to the encoder, and Whisper's takes none.
        return task_type if any(path.endswith("encoder.embed_tokens") for path in layout.modules) else None
    heads = tuple(path for path in layout.modules if path.endswith(_HEADS.get(task_type or "", ("\0",))))
    return task_type if set(heads) <= set(modules) else None


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
