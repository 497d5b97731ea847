"""What compression will do to every module of an adapter, decided from headers alone: its rank rule, its batch."""

from __future__ import annotations

import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lrgpu.rank import RankRule
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.adapter.target import TARGETS
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, parse_size, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.verbs.adapter_destination import DIALECTS
from mergekit_lr.verbs.adapter_source import Base, Source, open_base, open_source, refuse_residual
from mergekit_lr.verbs.compress.rule import check_patterns, rule_of, treatment
from mergekit_lr.verbs.extract.plan import DTYPES


class Task(NamedTuple):
    """The work of one node: matrix ``index`` of a weight's stack, and how its rank is chosen (None: only measured)."""

    delta: tuple[Tensor, Tensor]
    scaling: float
    rule: RankRule | None
    dtype: torch.dtype


@dataclass(frozen=True)
class Step:
    """One module: its rank rule, or None and the reason why it stays as it is, and its nodes, one per matrix."""

    name: str
    weight: AdaptedWeight
    rule: RankRule | None
    reason: str
    dtype: torch.dtype
    nodes: tuple[Node, ...] = ()

    @property
    def matrices(self) -> int:
        """How many matrices the stack has."""
        return self.weight.delta.A.shape[0] if self.weight.delta.A.ndim == 3 else 1

    @property
    def per_rank(self) -> int:
        """Numbers that one unit of rank stores: a row of A and a column of B, for every matrix of the stack."""
        return self.matrices * sum(self.weight.delta.shape[-2:])

    @property
    def bound(self) -> int:
        """The most rank that is kept of it."""
        rank = self.weight.delta.rank
        return rank if self.rule is None or self.rule.count is None else min(rank, self.rule.count)

    @property
    def needed(self) -> int:
        """The least rank: a weight with a bias or a DoRA magnitude keeps its place even where its delta is zero."""
        return 1 if self.weight.bias is not None or self.weight.magnitude is not None else 0


@dataclass(frozen=True)
class CompressPlan:
    """Everything that ``compress`` will do.

    steps: one for each module, in the source's order. budget: for the factors of all compressed modules together, in
    bytes (``in_bytes``) or in numbers. max_rank, multiple_of: bounds on any rank.
    """

    source: Source
    base: Base | None
    to: str
    target: str | None
    component: str | None
    steps: tuple[Step, ...]
    schedule: Schedule
    resources: Resources
    budget: int | None
    in_bytes: bool
    max_rank: int | None
    multiple_of: int
    options: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter, compare=False)

    def cost(self, step: Step) -> int:
        """What one unit of rank of a module takes from the budget."""
        return step.per_rank * (step.dtype.itemsize if self.in_bytes else 1)

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most: batches in flight, and the results until they are written."""
        results = sum(step.per_rank * step.bound * step.dtype.itemsize for step in self.steps if step.rule is not None)
        return self.resources.memory - self.resources.working + self.schedule.peak + results

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        cost = self.schedule.cost
        return {
            "adapter": self.source.ref,
            "dialect": self.source.dialect,
            "to": self.to,
            "target": self.target,
            "options": self.options,
            "device": str(self.resources.device),
            "batches": len(self.schedule.batches),
            "read_bytes": cost.read,
            "flops": cost.flops,
            "peak_bytes": self.peak,
            "modules": [
                {
                    "name": step.name,
                    "kind": str(step.weight.kind),
                    "shape": list(step.weight.delta.shape),
                    "rank": step.weight.delta.rank,
                    "action": "keep" if step.rule is None else "compress",
                    "reason": step.reason,
                }
                for step in self.steps
            ],
        }


def plan_compress(
    adapter: str | Path | Adapter,
    *,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: str | int | None = None,
    max_params: int | None = None,
    max_rank: int | None = None,
    multiple_of: int = 1,
    rank_pattern: Mapping[str, int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    to: str | None = None,
    target: str | None = None,
    component: str | None = None,
    base: str | Path | Checkpoint | Mapping[str, Tensor] | None = None,
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
) -> CompressPlan:
    """The plan of ``compress`` with the same arguments; reads headers only."""
    options = {key: value for key, value in locals().items() if key not in ("adapter", "base")}
    options |= {"dtype": str(dtype).removeprefix("torch.") if dtype else None, "base": str(base) if base else None}
    pattern = dict(rank_pattern or {})
    rule = rule_of(rank, energy, error, size, max_params, max_rank, multiple_of, pattern, target)
    stored = None if dtype is None else DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and stored is None:
        raise UsageError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    opened = open_base(base)
    source = open_source(adapter, opened)
    if source.variant is not None:
        raise UsageError(f"{source.ref}: is no LoRA yet; make it one with lrmerge convert --to peft, then compress it")
    if not source.adapter.weights:
        raise UsageError(f"{source.ref}: holds no low-rank factors, so there is nothing to compress")
    refuse_residual(source.adapter.config, source.ref)
    to = _destination(source.dialect, to, target)
    named_for(source.adapter, source.dialect, to, component)  # refuses now what would be refused at the end
    steps = _steps(source.adapter.weights, rule, pattern, multiple_of, include, exclude, stored)
    available = resources(device=device, memory=memory, threads=threads)
    nodes = (node for step in steps for node in step.nodes)
    batches = schedule(nodes, budget=available.working, workers=available.workers)
    budget = _budget(source.adapter, steps, size, max_params)
    return CompressPlan(
        source, opened, to, target, component, steps, batches, available, budget, size is not None, max_rank,
        multiple_of, options,
    )  # fmt: skip


def _destination(dialect: str, to: str | None, target: str | None) -> str:
    if to is not None and to not in DIALECTS:
        raise UsageError(f"--to {to}: choose {', '.join(DIALECTS)}")
    if target is None:
        return to or dialect
    if target not in TARGETS:
        raise UsageError(f"--target {target}: choose {', '.join(TARGETS)}")
    if to not in (None, "peft"):
        raise UsageError(f"--target {target} reads PEFT folders; leave --to {to} out")
    return "peft"


def _steps(
    weights: Mapping[str, AdaptedWeight],
    rule: RankRule | None,
    pattern: Mapping[str, int],
    multiple_of: int,
    include: Sequence[str],
    exclude: Sequence[str],
    stored: torch.dtype | None,
) -> tuple[Step, ...]:
    names = list(weights)
    for option, patterns in (("--include", include), ("--exclude", exclude), ("--rank-pattern", list(pattern))):
        check_patterns(option, patterns, names)
    steps = []
    for index, (name, weight) in enumerate(weights.items()):
        own = next((RankRule(count=n, multiple_of=multiple_of) for p, n in pattern.items() if re.search(p, name)), rule)
        own, reason = treatment(name, weight, own, include, exclude)
        dtype = stored or torch.promote_types(weight.delta.A.dtype, weight.delta.B.dtype)
        step = Step(name, weight, own, reason, dtype)
        nodes = tuple(_node(step, index, matrix) for matrix in range(step.matrices))
        steps.append(replace(step, nodes=nodes))
    return tuple(steps)


def _node(step: Step, position: int, matrix: int) -> Node:
    delta = step.weight.delta
    A, B = (factor[matrix] if factor.ndim == 3 else factor for factor in (delta.A, delta.B))
    (r, columns), rows = A.shape, B.shape[0]
    size = (rows + columns) * r
    kept = step.bound
    # Factors as stored and in float32, one of them in float64, and the result.
    memory = size * (A.element_size() + 4 + 8) + (rows + columns) * kept * 4 + 6 * 8 * r * r
    cost = Cost(size * A.element_size(), memory, 2.0 * size * (r + kept) + 30.0 * r**3)
    name = step.name if step.matrices == 1 else f"{step.name}[{matrix}]"
    signature = (tuple(A.shape), tuple(B.shape), A.dtype, B.dtype, step.rule, step.dtype)
    task = Task((A, B), delta.scaling, step.rule, step.dtype)
    return Node(name, signature, ("", position), cost, task)


def _budget(adapter: Adapter, steps: Sequence[Step], size: str | int | None, max_params: int | None) -> int | None:
    """What is left for the compressed modules once everything that stays has its share; None without a budget."""
    if size is None and max_params is None:
        return None
    limit = parse_size(size) if size is not None else max_params or 0
    rows = (tensor for _, tensor in adapter.token_rows.values())
    fixed = (*adapter.saved.values(), *adapter.added.values(), *rows)
    spent = sum(tensor.nbytes if size is not None else tensor.numel() for tensor in fixed)
    for step in steps:
        beside = [tensor for tensor in (step.weight.bias, step.weight.magnitude) if tensor is not None]
        spent += sum(tensor.nbytes if size is not None else tensor.numel() for tensor in beside)
        if step.rule is None or step.rule.count is not None:
            spent += step.bound * step.per_rank * (step.dtype.itemsize if size is not None else 1)
    if spent >= limit:
        option, unit = ("--size", "bytes") if size is not None else ("--max-params", "numbers")
        raise UsageError(f"{option} {size or max_params}: what is not compressed takes {spent} {unit} alone; give more")
    return limit - spent
