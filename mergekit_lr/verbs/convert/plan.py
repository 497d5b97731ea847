"""What conversion will do to every module of an adapter (copy it, compute its factors, refuse it) and what it takes."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from lrgpu.rank import RankRule
from torch import Tensor

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.resources import Resources, resources
from mergekit_lr.graph.schedule import Schedule, schedule
from mergekit_lr.report.compression import Kept, kept_tensors
from mergekit_lr.verbs.adapter_destination import DIALECTS
from mergekit_lr.verbs.adapter_source import Base, Source, open_base, open_source
from mergekit_lr.verbs.extract.plan import DEFAULT_RANK, DTYPES

Experts = Literal["fused", "per-expert"]
# The dialects that hold differences in full.
HOLDS_ADDED = ("lycoris", "comfy")


@dataclass(frozen=True)
class Step:
    """One changed parameter.

    action: ``copy`` (factors), ``keep`` (a difference in full), ``fold`` (DoRA), ``decompose`` (a difference in full),
    ``compute`` (a change of another of PEFT's types), ``add`` (a difference that is added to the base's vector and
    saved in full). rank: of its factors, the most that the rule allows where it is found on the way; 0 for what is no
    factors. nbytes: of what is written for it, at that rank. memory: bytes that are held while it is done.
    """

    name: str
    action: str
    reason: str
    rank: int
    nbytes: int
    memory: int

    @property
    def exact(self) -> bool:
        """Whether nothing can be lost but by rounding to another dtype."""
        return self.action in ("copy", "keep", "add")


@dataclass(frozen=True)
class ConvertPlan:
    """Everything that ``convert`` will do. rule: the ranks of changes that are not of low rank. stored: the dtype of
    what is computed. left_out: names of other components, which are not written."""

    source: Source
    base: Base | None
    to: str
    experts: Experts | None
    fold: bool
    component: str | None
    rule: RankRule
    dtype: torch.dtype | None
    stored: torch.dtype
    resources: Resources
    seed: int
    steps: tuple[Step, ...]
    schedule: Schedule
    left_out: tuple[str, ...]
    options: dict[str, Any] = field(default_factory=dict)
    started: float = field(default_factory=time.perf_counter, compare=False)

    def parameter(self, name: str) -> Parameter:
        """The base's parameter ``name``, with or without the component in front.

        Raises:
            UsageError: no base was given. MismatchError: it has no such parameter.
        """
        if self.base is None:
            raise UsageError(f"{name}: its weight in the base is needed; give --base")
        known = self.base.layout.by_name
        found = known.get(name) or known.get(name.partition(".")[2])
        if found is None:
            raise MismatchError(f"the base has no parameter {name}, which the adapter changes: is it another base?")
        return found

    def weight(self, name: str) -> tuple[Parameter, Tensor]:
        """The base's parameter ``name``, and its values in its own layout.

        Raises:
            UsageError: no base was given. MismatchError: it has no such parameter.
        """
        parameter = self.parameter(name)
        if self.base is None:
            raise UsageError(f"{name}: its weight in the base is needed; give --base")
        return parameter, self.base.read(parameter)

    def others(self, left_out: tuple[str, ...]) -> tuple[Kept, ...]:
        """Every tensor beside the factors, with what becomes of it; what is made into factors is none of them."""
        made = {("added", step.name) for step in self.steps if step.action == "decompose"}
        made |= {("magnitude", step.name) for step in self.steps if step.action == "fold"}
        return tuple(one for one in kept_tensors(self.source.adapter, left_out) if (one.part, one.name) not in made)

    @property
    def written(self) -> int:
        """Bytes of tensors in the result, ranks that are found on the way at the most that the rule allows."""
        others = (one for one in self.others(self.left_out) if one.part != "added")  # these are steps of their own
        kept = sum(one.nbytes for one in others if one.state != "left out")
        return kept + sum(step.nbytes for step in self.steps if step.name not in self.left_out)

    @property
    def peak(self) -> int:
        """Bytes that the process may hold at most: what is under way, and the results until they are written."""
        results = sum(step.nbytes for step in self.steps if step.action not in ("copy", "keep"))
        return self.resources.memory - self.resources.working + self.schedule.peak + results

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "adapter": self.source.ref,
            "dialect": self.source.dialect,
            "to": self.to,
            "options": self.options,
            "device": str(self.resources.device),
            "workers": self.resources.workers,
            "read_bytes": self.source.nbytes,
            "written_bytes": self.written,
            "peak_bytes": self.peak,
            "modules": [
                {
                    "name": s.name,
                    "action": "leave out" if s.name in self.left_out else s.action,
                    "reason": s.reason,
                    "rank": s.rank,
                    "bytes": s.nbytes,
                    "exact": s.exact,
                }
                for s in self.steps
            ],
            "others": [
                {"name": o.name, "part": o.part, "state": o.state, "bytes": o.nbytes}
                for o in self.others(self.left_out)
            ],
        }


def plan_convert(
    adapter: str | Path | Adapter,
    *,
    to: str,
    experts: Experts | None = None,
    dora: Literal["keep", "fold"] = "keep",
    base: str | Path | Checkpoint | Mapping[str, Tensor] | None = None,
    component: str | None = None,
    rank: int | None = None,
    energy: float | None = None,
    error: float | None = None,
    max_rank: int | None = None,
    multiple_of: int = 1,
    dtype: str | torch.dtype | None = None,
    memory: str | int | None = None,
    device: str = "auto",
    threads: int | None = None,
    seed: int = 0,
) -> ConvertPlan:
    """The plan of ``convert`` with the same arguments; reads headers only."""
    options = {key: value for key, value in locals().items() if key not in ("adapter", "base")}
    options |= {"dtype": str(dtype).removeprefix("torch.") if dtype else None, "base": str(base) if base else None}
    for option, value, choices in (
        ("--to", to, DIALECTS),
        ("--experts", experts, (None, "fused", "per-expert")),
        ("--dora", dora, ("keep", "fold")),
    ):
        if value not in choices:
            raise UsageError(f"{option} {value}: choose {', '.join(choice for choice in choices if choice)}")
    wanted = None if dtype is None else DTYPES.get(str(dtype).removeprefix("torch."))
    if dtype is not None and wanted is None:
        raise UsageError(f"--dtype {dtype}: choose {', '.join(DTYPES)}")
    if dora == "fold" and base is None:
        raise UsageError("--dora fold: a DoRA rescales the base's own weights; give --base")
    rule = _rule(rank, energy, error, max_rank, multiple_of)
    opened = open_base(base)
    source = open_source(adapter, opened)
    left_out: tuple[str, ...] = ()
    if source.adapter.weights:  # refuses now what would be refused at the end
        left_out = named_for(source.adapter, source.dialect, to, component).left_out
    stored, fold = wanted or _stored(source), dora == "fold"
    available = resources(device=device, memory=memory, threads=threads)
    steps = tuple(_Steps(source, opened, to, fold, rule, wanted, stored).all())
    share = source.nbytes // max(len(steps), 1)  # read: for the progress
    costs = (Cost(share, step.memory, 0.0) for step in steps)
    nodes = (
        Node(s.name, place, ("", place), cost, s) for place, (s, cost) in enumerate(zip(steps, costs, strict=True))
    )
    return ConvertPlan(
        source,
        opened,
        to,
        experts,
        fold,
        component,
        rule,
        wanted,
        stored,
        available,
        seed,
        steps,
        schedule(nodes, budget=available.working, workers=available.workers),
        left_out,
        options,
    )


def _rule(rank, energy, error, max_rank, multiple_of) -> RankRule:
    named = [o for o, v in (("--rank", rank), ("--energy", energy), ("--error", error)) if v is not None]
    if len(named) > 1:
        raise UsageError(f"{named[0]} and {named[1]} both choose the rank; give one")
    if rank is not None and (not isinstance(rank, int) or rank < 1):
        raise UsageError(f"--rank {rank}: a number from 1")
    count = None if energy is not None or error is not None else rank or DEFAULT_RANK
    try:
        return RankRule(count=count, energy=energy, error=error, max_rank=max_rank, multiple_of=multiple_of)
    except ValueError as problem:
        raise UsageError(str(problem)) from None


def _stored(source: Source) -> torch.dtype:
    """The floating dtype that holds most of the source; float32 where that is nothing that PEFT computes in."""
    sizes: dict[torch.dtype, int] = {}
    for info in source.tensors.values():
        sizes[info.dtype] = sizes.get(info.dtype, 0) + info.nbytes
    most = max(sizes, key=lambda dtype: sizes[dtype], default=torch.float32)
    return most if most in DTYPES.values() else torch.float32


# A difference in float32, its squares in float64, what is left of it, and the sketches of its decomposition.
_BYTES_PER_NUMBER = 32


@dataclass(frozen=True)
class _Steps:
    """One step for every changed parameter, in the source's order."""

    source: Source
    base: Base | None
    to: str
    fold: bool
    rule: RankRule
    dtype: torch.dtype | None
    stored: torch.dtype

    def all(self) -> Iterator[Step]:
        """The steps.

        Raises:
            UsageError: a difference that no factors hold and the dialect has no place for.
        """
        if self.source.variant is not None:
            for site in self.source.variant.sites:
                name = f"{site.module}.weight"
                parameter = self.source.variant.parameters[name]
                yield self._factors(name, "compute", parameter.matrix_shape, str(site.config.get("peft_type")))
        for name, weight in self.source.adapter.weights.items():
            delta = weight.delta
            if self.fold and weight.magnitude is not None:
                yield self._factors(name, "fold", (delta.shape[-2], delta.shape[-1]))
                continue
            factors = (delta.A, delta.B)
            nbytes = sum(factor.numel() * (self.dtype or factor.dtype).itemsize for factor in factors)
            yield Step(name, "copy", "", delta.rank, nbytes, 4 * sum(factor.numel() for factor in factors))
        for name, difference in self.source.adapter.added.items():
            yield self._difference(name, difference)

    def _difference(self, name: str, difference: Tensor) -> Step:
        if self.to in HOLDS_ADDED:
            return Step(name, "keep", "a difference in full", 0, difference.nbytes, difference.nbytes)
        if difference.ndim > 1:
            matrix = (difference.shape[0], difference[0].numel())
            return self._factors(name, "decompose", matrix, "a difference in full")
        if self.to == "peft" and self.base is not None:
            why = "a difference of a vector: PEFT replaces it whole"
            return Step(name, "add", why, 0, difference.nbytes, 8 * difference.numel())
        places = "give --base, or convert to" if self.to == "peft" else "convert to"
        raise UsageError(f"{name}: is a difference of a vector, which {self.to} has no place for; {places} lycoris")

    def _factors(self, name: str, action: str, matrix: tuple[int, int], reason: str = "") -> Step:
        """A change of shape ``matrix`` that gets factors at the rank of the rule."""
        limits = (self.rule.count, self.rule.max_rank, *matrix)
        rank = min(limit for limit in limits if limit is not None)
        nbytes = rank * sum(matrix) * self.stored.itemsize
        return Step(name, action, reason, rank, nbytes, _BYTES_PER_NUMBER * matrix[0] * matrix[1] + nbytes)


def as_kind(difference: Tensor, parameter: Parameter | None) -> Kind:
    """How a difference in full maps to a matrix: as the base says, or by its axes."""
    if parameter is not None:
        return parameter.kind
    return Kind.LINEAR if difference.ndim == 2 else Kind.CONVOLUTION
