"""What a merge of adapters will do: which parts of which parameter meet, by which rule, and where the result goes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.methods.registry import Method
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.adapter_source import Base, open_base
from mergekit_lr.verbs.apply.plan import DTYPES
from mergekit_lr.verbs.compare import CompareReport
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_rules import check_places, is_dense, rule_of
from mergekit_lr.verbs.merge.adapter_sources import Opened, open_adapters
from mergekit_lr.verbs.merge.adapter_steps import steps_of
from mergekit_lr.verbs.merge.earlier import continued_steps
from mergekit_lr.verbs.merge.plan import chosen_dtype


@dataclass(frozen=True, eq=False)
class AdapterPlan:
    """Everything that a merge of adapters will do.

    kind: of the result, model or adapter. to: its dialect. onto: the base. adapters: in the recipe's order. steps:
    what is merged. states: label of a step to merged, or parameter to left out. rules: to how, in words.
    """

    recipe: Recipe
    kind: str
    to: str
    onto: Base | None
    adapters: tuple[Opened, ...]
    steps: tuple[Step, ...]
    states: dict[str, str]
    rules: dict[str, str]
    schedule: Schedule
    resources: Resources
    notes: tuple[str, ...]
    seed: int
    dtype: str | None
    options: dict[str, Any] = field(default_factory=dict)
    similarity: CompareReport | None = None

    @property
    def base(self) -> Checkpoint | None:
        """The base's files."""
        return self.onto.checkpoint if self.onto is not None else None

    @property
    def layout(self) -> Layout | None:
        """The base's parameters in memory."""
        return self.onto.layout if self.onto is not None else None

    @property
    def truncated(self) -> bool:
        """Whether the recipe cuts the result at a rank, an energy or a size."""
        output = self.recipe.document.output
        return any(limit is not None for limit in (output.rank, output.energy, output.size))

    @property
    def stored_dtype(self) -> torch.dtype:
        """The dtype of the result's factors: what was asked for, or that of the first factors that were given."""
        if self.dtype:
            return DTYPES[self.dtype]
        weights = (weight for one in self.adapters for weight in one.adapter.weights.values())
        return next((weight.delta.A.dtype for weight in weights), torch.float32)

    @property
    def files(self) -> tuple[Path, ...]:
        """Files of all adapters."""
        return tuple(file for one in self.adapters for file in one.files)

    @property
    def inputs(self) -> list[Path]:
        """What must not be overwritten."""
        own = [file if file.suffix == ".safetensors" and self.to != "peft" else file.parent for file in self.files]
        return own + ([self.base.folder] if self.base and self.base.folder else [])

    @property
    def reads_base(self) -> bool:
        """Whether weights of the base are needed, and not its headers alone."""
        return self.kind == "model" or any(
            step.origin is not None or (step.part == "change" and len(step.size) < 2) or any(map(callable, step.given))
            for step in self.steps
        )

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most while modules are merged."""
        return self.resources.memory - self.resources.working + self.schedule.peak

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "method": self.recipe.method.name,
            "kind": self.kind,
            "to": self.to if self.kind == "adapter" else None,
            "space": self.recipe.document.space,
            "models": [one.ref for one in self.adapters],
            "base": self.base.ref if self.base else None,
            "options": self.options,
            "read_bytes": self.schedule.cost.read,
            "download_bytes": self.base.to_download if self.base is not None and self.reads_base else 0,
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
    given: Mapping[str, Any] | None = None,
) -> AdapterPlan:
    """The plan of merging the ``adapters`` of a recipe; opens them, and the base's headers.

    Args:
        recipe: with ``adapters``. given: adapters in memory, and a base, by the names that the recipe has for them.
            The others as in ``merge``.

    Raises:
        LrmergeError: adapters that do not go together, or a result that no adapter can hold.
    """
    doc, method = recipe.document, recipe.method
    kind = doc.output.kind or "adapter"
    to = doc.output.format or "peft"
    size = shard_size if shard_size is not None else doc.output.shard_size
    if size is not None and kind == "adapter":
        raise UsageError(f"--shard-size {size}: an adapter is one file")
    options = {"dtype": chosen_dtype(recipe, dtype), "shard_size": size, "memory": memory, "device": device}
    options |= {"threads": threads, "seed": seed}
    given = given or {}
    onto = open_base(given.get(doc.base_model or "", doc.base_model))
    refs = [entry.adapter for entry in doc.adapters or ()]
    _check_count(recipe, len(refs))
    folded = kind == "model" or doc.output.dora == "fold"
    opened = open_adapters(refs, given, onto, fold=folded, fuse=kind == "model")
    every = steps_of(recipe, opened, onto)
    steps = continued_steps(recipe, opened, [step for step in every if recipe.wants(step.name)], onto)
    if not steps:
        raise recipe.place.error(("targets",), "leaves nothing of the adapters to merge")
    left_out = dict.fromkeys(step.label for step in every if not recipe.wants(step.name))
    check_places(recipe, opened, steps, kind, to, onto)
    available = resources(device=device, memory=memory, threads=threads)
    nodes = [_node(method, step, is_dense(recipe, step), position) for position, step in enumerate(steps)]
    return AdapterPlan(
        recipe=recipe,
        kind=kind,
        to=to,
        onto=onto,
        adapters=opened,
        steps=tuple(steps),
        states={step.label: "merged" for step in steps} | dict.fromkeys(left_out, "left out"),
        rules={step.label: rule_of(method, step) for step in steps} | dict.fromkeys(left_out, "targets"),
        schedule=schedule(nodes, budget=available.working, workers=available.workers),
        resources=available,
        notes=(*recipe.notes, *_notes(recipe, opened, steps, kind)),
        seed=seed,
        dtype=options["dtype"],
        options=options,
    )


def _check_count(recipe: Recipe, count: int) -> None:
    least, most = recipe.method.models
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"{least} or more"
        raise recipe.place.error(("adapters",), f"{recipe.method.name} merges {wanted}, got {count}")


def _node(method: Method, step: Step, dense: bool, position: int) -> Node:
    factors = [one for one in step.given if isinstance(one, LowRank)]
    tensors = [one for one in step.given if isinstance(one, Tensor)]
    read = sum(f.A.nbytes + f.B.nbytes for f in factors) + sum(tensor.nbytes for tensor in tensors)
    *lead, m, n = (1, 1, *step.size) if len(step.size) < 2 else step.size
    count, ranks = max(1, *lead) if lead else 1, sum(f.rank for f in factors)
    # Factors, their bases and coordinates in float64; whole deltas where there are some or the method needs them.
    memory = read + count * 8 * (4 * ranks * (m + n) + (6 + len(factors)) * ranks * ranks)
    whole = dense or step.part != "change" or not step.factored
    memory += 4 * count * m * n * (len(step.given) + 6) if whole else 0
    flops = 4.0 * count * (m + n) * ranks * ranks
    return Node(step.label, step.label, ("", position), Cost(max(read, 1), memory, flops), step)


def _notes(recipe: Recipe, opened: Sequence[Opened], steps: Sequence[Step], kind: str) -> Iterable[str]:
    changes = [step for step in steps if step.part == "change"]
    if partial := sum(any(one is None for one in step.given) for step in changes):
        yield f"{partial} of {len(changes)} modules are not in every adapter; there a missing change counts as zero"
    if mean := sum(step.averaged for step in steps if len(opened) > 1):
        yield f"{mean} tensors in full are averaged; with a base_model they are merged as differences from it"
    if len(opened) > 1 and any(step.part == "magnitude" for step in steps):
        yield (
            "DoRA magnitudes are merged apart from the factors, which is not the merge of what the adapters do; "
            "output.dora: fold with a base_model and output.rank is"
        )
    if any(not step.factored for step in changes) and recipe.document.space != "full":
        yield f"changes that are no factors are merged in full, not in the space {recipe.document.space}"
