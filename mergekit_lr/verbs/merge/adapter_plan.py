"""What a merge of adapters will do to every module: which deltas meet, by which rule, and what becomes of them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.recipe.parameters import arguments, renamed
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.adapter_source import open_base, open_source
from mergekit_lr.verbs.merge.plan import chosen_dtype, rule_in_words
from mergekit_lr.verbs.merge.sources import layers_of


class Opened(NamedTuple):
    """One adapter of a recipe. files: that it was read from."""

    ref: str
    adapter: Adapter
    files: tuple[Path, ...]


@dataclass(frozen=True, eq=False)
class Step:
    """One module: the deltas of all adapters, one of rank 0 where an adapter leaves it alone."""

    name: str
    kind: Kind
    shape: tuple[int, ...] | None
    deltas: tuple[LowRank, ...]
    arguments: dict[str, Any]


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """Everything that a merge of adapters will do.

    kind: of the result. adapters: in the recipe's order. steps: one per module. dense: whether the method's results
    are dense matrices, which an adapter can only hold truncated. states: module to merged or left out.
    """

    recipe: Recipe
    kind: str
    base: Checkpoint | None
    layout: Layout | None
    adapters: tuple[Opened, ...]
    steps: tuple[Step, ...]
    dense: bool
    states: dict[str, str]
    rules: dict[str, str]
    schedule: Schedule
    resources: Resources
    notes: tuple[str, ...]
    seed: int
    dtype: str | None
    options: dict[str, Any] = field(default_factory=dict)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of all adapters."""
        return tuple(file for one in self.adapters for file in one.files)

    @property
    def inputs(self) -> list[Path]:
        """What must not be overwritten."""
        return [file.parent for file in self.files] + ([self.base.folder] if self.base and self.base.folder else [])

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most while modules are merged."""
        return self.resources.memory - self.resources.working + self.schedule.peak

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "method": self.recipe.method.name,
            "kind": self.kind,
            "space": self.recipe.document.space,
            "models": [one.ref for one in self.adapters],
            "base": self.base.ref if self.base else None,
            "options": self.options,
            "read_bytes": self.schedule.cost.read,
            "peak_bytes": self.peak,
            "batches": len(self.schedule.batches),
            "workers": self.resources.workers,
            "device": str(self.resources.device),
            "notes": list(self.notes),
            "states": dict(Counter(self.states.values())),
            "tensors": [{"name": n, "state": state, "rule": self.rules[n]} for n, state in self.states.items()],
        }


def plan_adapters(
    recipe: Recipe,
    *,
    dtype: str | None = None,
    shard_size: str | int | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> AdapterPlan:
    """The plan of merging the ``adapters`` of a recipe; opens them, and the base's headers."""
    doc, method = recipe.document, recipe.method
    kind = doc.output.kind or "adapter"
    size = shard_size if shard_size is not None else doc.output.shard_size
    if size is not None and kind == "adapter":
        raise UsageError(f"--shard-size {size}: an adapter is one file")
    options = {"dtype": chosen_dtype(recipe, dtype), "shard_size": size, "memory": memory, "device": device}
    options |= {"threads": threads, "seed": seed}
    dense = doc.space == "full" and not method.factored
    truncated = any(getattr(doc.output, key) is not None for key in ("rank", "energy", "size"))
    if dense and kind == "adapter" and not truncated:
        spaces = [f"space: {space}" for space in method.spaces if space != "full"]
        raise recipe.place.error(
            ("output",) if "output" in recipe.content else (),
            f"{method.name} of whole deltas is of full rank, no adapter; give {' or '.join([*spaces, 'output.rank'])}",
        )
    base = open_base(doc.base_model)
    opened = tuple(_opened(entry.adapter, base) for entry in doc.adapters or ())
    least, most = method.models
    if len(opened) < least or (most is not None and len(opened) > most):
        wanted = str(least) if least == most else f"{least} or more"
        raise recipe.place.error(("adapters",), f"{method.name} merges {wanted}, got {len(opened)}")
    layout = base.layout if base is not None else None
    names = [name for name in _names(opened, layout) if recipe.wants(name)]
    left_out = [name for name in _names(opened, layout) if name not in set(names)]
    if not names:
        raise recipe.place.error(("targets",), "leaves nothing of the adapters to merge")
    steps = tuple(_step(recipe, opened, name, names) for name in names)
    available = resources(device=device, memory=memory, threads=threads)
    nodes = [_node(step, dense, position) for position, step in enumerate(steps)]
    partial = sum(any(delta.rank == 0 for delta in step.deltas) for step in steps)
    notes = [f"{partial} of {len(steps)} modules are not in every adapter; there a missing change counts as zero"]
    return AdapterPlan(
        recipe=recipe,
        kind=kind,
        base=base.checkpoint if base is not None else None,
        layout=layout,
        adapters=opened,
        steps=steps,
        dense=dense,
        states=dict.fromkeys(names, "merged") | dict.fromkeys(left_out, "left out"),
        rules={step.name: rule_in_words(method.name, step.arguments) for step in steps}
        | dict.fromkeys(left_out, "targets"),
        schedule=schedule(nodes, budget=available.working, workers=available.workers),
        resources=available,
        notes=(*recipe.notes, *(notes if partial else ())),
        seed=seed,
        dtype=options["dtype"],
        options=options,
    )


def _opened(ref: str, base: Any) -> Opened:
    source = open_source(ref, base)
    if source.variant is not None:
        raise UsageError(f"{ref}: is no LoRA yet; make it one with lrmerge convert --to peft, then merge it")
    adapter = source.adapter
    beside = (
        ("modules saved in full", adapter.saved),
        ("trained token rows", adapter.token_rows),
        ("differences in full", adapter.added),
        ("biases", [w for w in adapter.weights.values() if w.bias is not None]),
        ("DoRA magnitudes", [w for w in adapter.weights.values() if w.magnitude is not None]),
    )
    for what, held in beside:
        if held:
            raise UsageError(
                f"{ref}: holds {what}, which are no low-rank deltas and are not merged; apply each adapter to its "
                "base and merge the models"
            )
    if not adapter.weights:
        raise UsageError(f"{ref}: holds no low-rank factors, so there is nothing to merge")
    path = source.path
    files = sorted(path.glob("adapter_*")) if path is not None and path.is_dir() else [path] if path is not None else []
    return Opened(ref, adapter, tuple(files))


def _names(opened: Sequence[Opened], layout: Layout | None) -> list[str]:
    """Every module of any adapter, in the base's order where there is one."""
    names = list(dict.fromkeys(name for one in opened for name in one.adapter.weights))
    if layout is None:
        return names
    order = {name: i for i, name in enumerate(layout.by_name)}
    for one in opened:
        for name in one.adapter.weights:
            if name not in order:
                raise MismatchError(f"{one.ref}: changes {name}, which the base_model does not have; is it of another?")
    return sorted(names, key=order.__getitem__)


def _step(recipe: Recipe, opened: Sequence[Opened], name: str, names: Sequence[str]) -> Step:
    held = [one.adapter.weights.get(name) for one in opened]
    lead = next(weight for weight in held if weight is not None)
    for one, weight in zip(opened, held, strict=True):
        if weight is not None and weight.delta.shape != lead.delta.shape:
            raise MismatchError(
                f"{name} has a change of shape {list(weight.delta.shape)} in {one.ref} and {list(lead.delta.shape)} in "
                "another adapter: they are of different bases"
            )
    deltas = tuple(_zero(lead) if weight is None else weight.delta for weight in held)
    layers = layers_of(dict.fromkeys(names, (torch.float32, ())), {})
    layer = layers.of(name)
    t = 0.0 if layer is None else layer / (layers.count - 1) if layers.count > 1 else 1.0
    scopes = [renamed(entry.parameters) for entry in recipe.document.adapters or ()]
    found = arguments(recipe.method, scopes, [recipe.shared], [name] * len(held), name, t)
    shape = next((weight.shape for weight in held if weight is not None and weight.shape is not None), None)
    return Step(name, lead.kind, shape, deltas, found)


def _zero(like: AdaptedWeight) -> LowRank:
    """A change of nothing, for a module that an adapter leaves alone."""
    A, B = like.delta.A, like.delta.B
    return LowRank(A.new_zeros(*A.shape[:-2], 0, A.shape[-1]), B.new_zeros(*B.shape[:-1], 0))


def _node(step: Step, dense: bool, position: int) -> Node:
    m, n = step.deltas[0].shape[-2:]
    count = step.deltas[0].shape[0] if len(step.deltas[0].shape) > 2 else 1
    ranks = sum(delta.rank for delta in step.deltas)
    read = sum(delta.A.nbytes + delta.B.nbytes for delta in step.deltas)
    # Factors, their bases and coordinates in float64; whole deltas where the method needs those.
    memory = read + count * 8 * (4 * ranks * (m + n) + (6 + len(step.deltas)) * ranks * ranks)
    memory += 4 * count * m * n * (len(step.deltas) + 6) if dense else 0
    flops = 4.0 * count * (m + n) * ranks * ranks
    return Node(step.name, step.name, ("", position), Cost(max(read, 1), memory, flops), step)
