"""What extraction will do to every tensor, decided from headers alone: its treatment, its rank rule, its batch."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from typing import Any, Literal, NamedTuple

import torch
from lrgpu.rank import RankRule
from torch import Tensor

from mergekit_lr.adapter.peft_carry import Carry, carry
from mergekit_lr.checkpoint.checkpoint import Checkpoint, storage_dtype
from mergekit_lr.checkpoint.pair import Pair, Pairing, Vocabulary, pair
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, parse_size, resources
from mergekit_lr.graph.schedule import Schedule, schedule

DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}
DEFAULT_RANK = 64
# With one byte budget for all modules, the first look at each goes this far beyond the rank that an equal share gives.
LOOK_AHEAD = 4


class Treatment(str, Enum):
    """What becomes of a parameter."""

    DECOMPOSE = "decompose"  # its delta becomes low-rank factors
    COMPARE = "compare"  # saved in full if it changed
    KEEP = "keep"  # saved in full in any case: a grown table
    LEAVE = "leave"  # not in the adapter; its change is measured

    def __str__(self) -> str:
        return self.value


@dataclass(frozen=True)
class Selection:
    """Which parameters are treated how.

    include, exclude: regular expressions searched in names in memory. embeddings: for tables and output heads that
    changed. rest: for what no low-rank factors can carry (norms, biases, ...).
    """

    include: Sequence[str] = ()
    exclude: Sequence[str] = ()
    embeddings: Literal["lora", "full", "skip"] = "lora"
    rest: Literal["full", "skip"] = "full"

    def treat(self, pair: Pair, possible: Carry, vocabulary: int | None, *, keep_grown: bool) -> tuple[Treatment, str]:
        """The treatment of ``pair`` and, where something leaves it out or alters its way, the rule that does.

        possible: how everything would travel if all of it had changed.
        """
        parameter = pair.base
        for pattern in self.exclude:
            if re.search(pattern, pair.name):
                return Treatment.LEAVE, f"--exclude {pattern}"
        if self.include and not any(re.search(pattern, pair.name) for pattern in self.include):
            return Treatment.LEAVE, "not in --include"
        if pair.grown and keep_grown:
            return Treatment.KEEP, "vocabulary grew, --vocab keep"
        head = parameter.kind is Kind.LINEAR and parameter.shape[0] == vocabulary
        if parameter.kind is Kind.EMBEDDING or head:
            if self.embeddings == "skip":
                return Treatment.LEAVE, "--embeddings skip"
            if self.embeddings == "full":
                return Treatment.COMPARE, "--embeddings full"
        if pair.name in possible.factors:
            return Treatment.DECOMPOSE, ""
        if self.rest == "skip":
            return Treatment.LEAVE, "--rest skip"
        return Treatment.COMPARE, possible.reasons.get(pair.name, "")


class Task(NamedTuple):
    """The work of one node: matrix ``index`` of ``pair``, and how its rank is chosen (None: only measured).

    noise: where the rank ends at the noise floor of rounding, the dtype that was rounded to.
    """

    pair: Pair
    index: int
    rule: RankRule | None
    noise: torch.dtype | None = None


@dataclass(frozen=True)
class Ranks:
    """How ranks are chosen. rule: for all modules. noise: keep what stands above the noise floor of rounding the
    weights to this dtype. pattern: regular expression to a rank of its own, the first that matches holds."""

    rule: RankRule
    noise: torch.dtype | None = None
    pattern: Mapping[str, int] = field(default_factory=dict)

    def of(self, name: str) -> tuple[RankRule, torch.dtype | None]:
        """The rule for the parameter ``name``, and the dtype whose rounding noise ends its rank."""
        for pattern, count in self.pattern.items():
            if re.search(pattern, name):
                return RankRule(count=count, multiple_of=self.rule.multiple_of), None
        return self.rule, self.noise


@dataclass(frozen=True)
class Step:
    """One parameter of the plan: what happens to it, by which rule, in which nodes."""

    pair: Pair
    treatment: Treatment
    reason: str
    nodes: tuple[Node, ...]


@dataclass(frozen=True)
class ExtractPlan:
    """Everything that ``extract`` will do, known from headers.

    steps: one for each parameter, in model order. schedule: of the batches. budget: bytes for all factors together,
    where one was given.
    """

    base: Checkpoint
    finetuned: Checkpoint
    pairing: Pairing
    steps: tuple[Step, ...]
    schedule: Schedule
    resources: Resources
    dtype: torch.dtype
    ranks: Ranks
    selection: Selection
    budget: int | None
    keep_grown: bool
    seed: int
    options: dict[str, Any] = field(default_factory=dict)

    def with_ranks(self, ranks: Ranks) -> ExtractPlan:
        """The same plan under other rank rules: its steps and batches made anew."""
        made = steps(self, ranks)
        nodes = (node for step in made for node in step.nodes)
        batches = schedule(nodes, budget=self.resources.working, workers=self.resources.workers)
        return replace(self, ranks=ranks, steps=made, schedule=batches)

    def deeper(self, counts: Mapping[str, int]) -> ExtractPlan:
        """The same plan with more singular values of some parameters, ``counts`` by name."""
        patterns = {f"^{re.escape(name)}$": count for name, count in counts.items()}
        return self.with_ranks(replace(self.ranks, pattern=dict(self.ranks.pattern) | patterns))

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        cost = self.schedule.cost
        return {
            "base": self.base.ref,
            "finetuned": self.finetuned.ref,
            "options": self.options,
            "layout": self.pairing.layout.source,
            "device": str(self.resources.device),
            "workers": self.resources.workers,
            "batches": len(self.schedule.batches),
            "read_bytes": cost.read,
            "download_bytes": self.base.to_download + self.finetuned.to_download,
            "flops": cost.flops,
            "peak_bytes": self.peak,
            "parameters": [
                {
                    "name": step.pair.name,
                    "kind": str(step.pair.base.kind),
                    "shape": list(step.pair.base.shape),
                    "treatment": str(step.treatment),
                    "reason": step.reason,
                    "read_bytes": sum(node.cost.read for node in step.nodes),
                }
                for step in self.steps
            ],
        }

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most."""
        return self.resources.memory - self.resources.working + self.schedule.peak


def plan_extract(
    base: str | Path | Checkpoint | Mapping[str, Tensor],
    finetuned: str | Path | Checkpoint | Mapping[str, Tensor],
    *,
    rank: int | Literal["auto"] | None = None,
    energy: float | None = None,
    error: float | None = None,
    size: str | int | None = None,
    max_rank: int | None = None,
    multiple_of: int = 1,
    rank_pattern: Mapping[str, int] | None = None,
    include: Sequence[str] = (),
    exclude: Sequence[str] = (),
    embeddings: Literal["lora", "full", "skip"] = "lora",
    rest: Literal["full", "skip"] = "full",
    vocab: Vocabulary = "refuse",
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> ExtractPlan:
    """The plan of ``extract`` with the same arguments; reads headers only."""
    options = {key: value for key, value in locals().items() if key not in ("base", "finetuned")}
    old, new = Checkpoint.open(base), Checkpoint.open(finetuned)
    stored = _dtype(dtype) if dtype is not None else _adapter_dtype(storage_dtype(new))
    pairing = pair(old, new, vocab=vocab)
    available = resources(device=device, memory=memory, threads=threads)
    plan = ExtractPlan(
        base=old,
        finetuned=new,
        pairing=pairing,
        steps=(),
        schedule=Schedule((), available.workers, available.working, 0),
        resources=available,
        dtype=stored,
        ranks=_ranks(rank, energy, error, size, max_rank, multiple_of, rank_pattern or {}, storage_dtype(new)),
        selection=Selection(include, exclude, embeddings, rest),
        budget=parse_size(size, "--size") if size is not None else None,
        keep_grown=vocab == "keep",
        seed=seed,
        options=options | {"dtype": str(stored).removeprefix("torch.")},
    )
    plan = plan.with_ranks(plan.ranks)
    return plan.with_ranks(_first_look(plan)) if plan.budget is not None else plan


def steps(plan: ExtractPlan, ranks: Ranks) -> tuple[Step, ...]:
    """One step for each parameter that both sides have, in model order.

    Raises:
        UsageError: a pattern is no regular expression, or matches nothing.
    """
    names = [pair.name for pair in plan.pairing.pairs]
    _check_patterns("--include", plan.selection.include, names)
    _check_patterns("--exclude", plan.selection.exclude, names)
    _check_patterns("--rank-pattern", list(ranks.pattern), names)
    vocabulary = _vocabulary(plan.base)
    possible = carry(plan.pairing.layout, names)
    made = []
    for each in plan.pairing.pairs:
        treatment, reason = plan.selection.treat(each, possible, vocabulary, keep_grown=plan.keep_grown)
        rule, noise = ranks.of(each.name) if treatment is Treatment.DECOMPOSE else (None, None)
        count = 0 if treatment is Treatment.KEEP else each.base.matrices
        tasks = (Task(each, index, rule, noise) for index in range(count))
        made.append(Step(each, treatment, reason, tuple(_node(task, plan.base, plan.finetuned) for task in tasks)))
    return tuple(made)


def _node(task: Task, base: Checkpoint, finetuned: Checkpoint) -> Node:
    pair, index, rule = task.pair, task.index, task.rule
    rows, columns = pair.base.matrix_shape
    blocks = [(finetuned, block) for block in pair.finetuned.blocks[index]]
    blocks += [(base, block) for block in pair.base.blocks[index]]
    dtypes = tuple(checkpoint.tensors[block.tensor].dtype for checkpoint, block in blocks)
    read = rows * columns * (dtypes[0].itemsize + dtypes[-1].itemsize)
    memory, flops = read + 4 * rows * columns, 2.0 * rows * columns
    if rule is not None:
        width = basis_width(rule, min(rows, columns))
        memory += width * (8 * rows + 16 * columns) + 8 * 4 * width * width  # as it grows: once old, once new
        flops += 4.0 * rows * columns * width  # a product with the delta on either side for each column
    if max(len(pair.base.blocks[index]), len(pair.finetuned.blocks[index])) > 1:
        memory += read  # joined blocks are copied once
    name = pair.name if pair.base.matrices == 1 else f"{pair.name}[{index}]"
    first = finetuned.tensors[blocks[0][1].tensor]
    place = (str(first.file), first.offset + (blocks[0][1].index or 0))
    return Node(
        name, (pair.base.kind, (rows, columns), dtypes, rule, task.noise), place, Cost(read, memory, flops), task
    )


def basis_width(rule: RankRule, full_rank: int) -> int:
    """Columns of the basis that the truncated SVD grows for ``rule``, for most spectra: four blocks of 5/8 of the rank.

    All columns where the rank is not known beforehand.
    """
    known = [count for count in (rule.count, rule.max_rank) if count is not None]
    return min(full_rank, 11 * min(known) // 4 + 16) if known else full_rank


def _vocabulary(checkpoint: Checkpoint) -> int | None:
    text = checkpoint.config.get("text_config")
    nested = text.get("vocab_size") if isinstance(text, dict) else None
    return checkpoint.config.get("vocab_size", nested)


def _check_patterns(option: str, patterns: Sequence[str], names: Sequence[str]) -> None:
    for pattern in patterns:
        try:
            found = any(re.search(pattern, name) for name in names)
        except re.error as error:
            raise UsageError(f"{option} {pattern!r} is no regular expression: {error}") from None
        if not found:
            raise UsageError(f"{option} {pattern!r} matches no parameter; their names look like {names[0]}")


def _ranks(rank, energy, error, size, max_rank, multiple_of, pattern, stored: torch.dtype) -> Ranks:
    """The rank rules that the options mean; exactly one of the first four may be given."""
    given = {"--rank": rank, "--energy": energy, "--error": error, "--size": size}
    named = [option for option, value in given.items() if value is not None]
    if len(named) > 1:
        raise UsageError(f"{named[0]} and {named[1]} both choose the rank; give one")
    if rank is not None and rank != "auto" and (type(rank) is not int or rank < 1):
        raise UsageError(f"--rank {rank}: a number from 1, or auto")
    if low := next((key for key, count in pattern.items() if count < 1), None):
        raise UsageError(f"--rank-pattern {low}={pattern[low]}: ranks start at 1; use --exclude to leave a module out")
    try:
        limits = {"multiple_of": multiple_of, "max_rank": max_rank}
        if rank == "auto":
            return Ranks(RankRule(floor=0.0, **limits), stored, dict(pattern))
        if energy is not None or error is not None:
            return Ranks(RankRule(energy=energy, error=error, **limits), None, dict(pattern))
        return Ranks(RankRule(count=rank or DEFAULT_RANK, **limits), None, dict(pattern))
    except ValueError as problem:
        option, _, rest = str(problem).partition(" ")
        raise UsageError(f"--{option.replace('_', '-')} {rest}") from None


def _first_look(plan: ExtractPlan) -> Ranks:
    """For a byte budget: look at every module some way beyond the rank that an equal share would give it."""
    unit = sum(stored_per_rank(step) for step in plan.steps if step.treatment is Treatment.DECOMPOSE)
    share = (plan.budget or 0) / max(unit * plan.dtype.itemsize, 1)
    rule = replace(plan.ranks.rule, count=max(16, round(LOOK_AHEAD * share)))
    return replace(plan.ranks, rule=rule)


def stored_per_rank(step: Step) -> int:
    """Numbers that one unit of rank stores: a row of A and a column of B, for every matrix of the stack."""
    return step.pair.base.matrices * sum(step.pair.base.matrix_shape)


def _dtype(name: str | torch.dtype) -> torch.dtype:
    dtype = DTYPES.get(str(name).removeprefix("torch."))
    if dtype is None:
        raise UsageError(f"--dtype {name}: choose {', '.join(DTYPES)}")
    return dtype


def _adapter_dtype(stored: torch.dtype) -> torch.dtype:
    """The dtype of factors for a fine-tune stored so: its own where PEFT computes in it, the next wider otherwise."""
    if stored in DTYPES.values():
        return stored
    return torch.bfloat16 if stored.itemsize == 1 else torch.float32
