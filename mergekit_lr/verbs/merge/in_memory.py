"""Merging without files: tables of tensors into a table of tensors, adapters into an adapter.

Both build a recipe and run it as ``merge`` does, through the same plan, batches and methods. Inputs are shared, not
copied; beside them and the result no more is held than the batches in flight.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.run import Progress
from mergekit_lr.methods.registry import Method, canonical, find
from mergekit_lr.methods.spaces import Space
from mergekit_lr.verbs.merge.verb import merge

Tensors = Mapping[str, Tensor]
Reference = str | Path | Adapter


def merge_state_dicts(
    method: str,
    base: Tensors | None,
    models: Sequence[Tensors],
    /,
    *,
    dtype: str | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> dict[str, Tensor]:
    """Merges models that are in memory as tables of tensors (state dicts).

        merge_state_dicts("iso_c", base, [math, code], scale=1.0)
        merge_state_dicts("ties", base, [math, code], weights=[1.0, 0.5], density=0.3)
        merge_state_dicts("linear", None, [math, code], weights=[0.7, 0.3])

    Args:
        method: its name; ``methods()`` has them all.
        base: what the models' differences are relative to; None for methods on weights that need none.
        models: with the same names and shapes as the base.
        dtype: of the result's floating tensors, ``float32``, ``float16`` or ``bfloat16``; without it each keeps the
            base's (the first model's where there is no base). All arithmetic is in float32 at least.
        memory, device, threads: see ``resources``. seed: of methods that draw.
        progress: called with (bytes done, bytes in all, name) as batches finish.
        parameters: of the method. A list for a parameter that each model has its own of (``weights``, ``density``)
            has one entry per model; any entry may be what a recipe allows, a gradient over layers or filters.

    Returns:
        Every tensor of the base (of the first model), by name; integers as the base has them.

    Raises:
        LrmergeError: an unknown method or parameter, models of different names or shapes, NaN or Inf.
    """
    held: dict[str, Any] = {f"model {i}": _checkpoint(tensors, f"model {i}") for i, tensors in enumerate(models)}
    own, shared = _scopes(find(method), parameters, len(models))
    made: dict[str, Any] = {"version": 1, "merge_method": method, "parameters": shared}
    made["models"] = [{"model": name, "parameters": scope} for name, scope in zip(held, own, strict=True)]
    if base is not None:
        held["base"], made["base_model"] = _checkpoint(base, "base"), "base"
    options = {"dtype": dtype, "memory": memory, "device": device, "threads": threads, "seed": seed}
    result = merge(made, progress=progress, given=held, **options).result
    assert result is not None
    return result


def merge_adapters(
    method: str,
    adapters: Sequence[Reference],
    /,
    *,
    space: Space = "full",
    base: str | Path | Checkpoint | Tensors | None = None,
    rank: int | None = None,
    energy: float | None = None,
    size: str | int | None = None,
    dora: Literal["keep", "fold"] = "keep",
    dtype: str | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
    progress: Callable[[Progress], None] | None = None,
    **parameters: Any,
) -> Adapter:
    """Merges adapters into one, in their factors.

        merge_adapters("core_space", [math, code], inner="ties", density=0.3, rank=32)
        merge_adapters("ties", ["math-lora", "code-lora"], space="knots", weights=[1.0, 0.5])
        merge_adapters("task_arithmetic", [math, code], rank=16)  # cut off at rank 16, the best there is

    Args:
        method: its name; ``methods()`` has them all.
        adapters: ``Adapter`` objects, or folders, files and Hub ids of any dialect.
        space: where a method on deltas runs: "full", or "core" or "knots", which keep factors.
        base: the model that they are of: for types that are computed from it, and for tensors in full, which are then
            merged as differences from it.
        rank, energy, size: cut the result off, as in ``compress``; at most one. A method that has a ``rank`` of its
            own gets it.
        dora: keep magnitudes, or fold what they do into differences, which needs ``base``.
        dtype: of the factors, by default that of arithmetic, float32. The others as in :func:`merge_state_dicts`.

    Returns:
        The merged adapter. Modules that an adapter lacks count as unchanged by it.

    Raises:
        LrmergeError: an unknown method or parameter, adapters of different bases, a result that is of full rank.
    """
    rule = find(method)
    if rank is not None and "rank" in rule.parameters:
        parameters, rank = {**parameters, "rank": rank}, None
    names = [f"adapter {i}" if isinstance(ref, Adapter) else str(ref) for i, ref in enumerate(adapters)]
    held: dict[str, Any] = {n: ref for n, ref in zip(names, adapters, strict=True) if isinstance(ref, Adapter)}
    own, shared = _scopes(rule, parameters, len(adapters))
    made: dict[str, Any] = {"version": 1, "merge_method": method, "space": space, "parameters": shared}
    made["adapters"] = [{"adapter": name, "parameters": scope} for name, scope in zip(names, own, strict=True)]
    limits = {"rank": rank, "energy": energy, "size": size}
    made["output"] = {"dora": dora} | {key: value for key, value in limits.items() if value is not None}
    if isinstance(base, str | Path):
        made["base_model"] = str(base)
    elif base is not None:
        held["base"], made["base_model"] = Checkpoint.open(base), "base"
    options = {"dtype": dtype, "memory": memory, "device": device, "threads": threads, "seed": seed}
    adapter = merge(made, progress=progress, given=held, **options).adapter
    assert adapter is not None
    return adapter


def _checkpoint(tensors: Tensors, name: str) -> Checkpoint:
    return tensors if isinstance(tensors, Checkpoint) else Checkpoint.from_tensors(tensors, ref=name)


def _scopes(method: Method, given: Mapping[str, Any], count: int) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """Parameters as a recipe has them: those of each model, and those of all. A tuple counts as a list."""
    inner = find(str(given.get("inner", "task_arithmetic"))).parameters if "inner" in method.parameters else {}
    known = {**inner, **method.parameters}
    own: list[dict[str, Any]] = [{} for _ in range(count)]
    shared: dict[str, Any] = {}
    for key, value in canonical({key: value for key, value in given.items() if value is not None}).items():
        value = value.tolist() if isinstance(value, Tensor) else list(value) if isinstance(value, tuple) else value
        per_model = key in known and known[key].per_model
        if per_model and isinstance(value, list) and len(value) == count:
            for scope, entry in zip(own, value, strict=True):
                scope[key] = entry
        elif per_model and isinstance(value, list) and not any(isinstance(entry, Mapping) for entry in value):
            raise UsageError(f"{method.name}: {key!r} has {len(value)} values, expected one for each of {count} models")
        else:
            shared[key] = value
    return own, shared
