"""What conversion will do to every module of an adapter: copy it, compute its factors, or refuse it."""

from __future__ import annotations

import time
from collections.abc import Mapping
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
from mergekit_lr.graph.resources import resources
from mergekit_lr.verbs.adapter_destination import DIALECTS
from mergekit_lr.verbs.adapter_source import Base, Source, open_base, open_source
from mergekit_lr.verbs.extract.plan import DEFAULT_RANK, DTYPES

Experts = Literal["fused", "per-expert"]
# The dialects that hold differences in full.
HOLDS_ADDED = ("lycoris", "comfy")


@dataclass(frozen=True)
class Step:
    """One changed parameter. action: ``copy``, ``fold`` (DoRA), ``decompose`` (a difference in full), ``compute`` (a
    change of another of PEFT's types), ``add`` (a difference that is added to the base's vector and saved in full)."""

    name: str
    action: str
    reason: str = ""


@dataclass(frozen=True)
class ConvertPlan:
    """Everything that ``convert`` will do. rule: the ranks of changes that are not of low rank. stored: the dtype of
    what is computed."""

    source: Source
    base: Base | None
    to: str
    experts: Experts | None
    fold: bool
    component: str | None
    rule: RankRule
    dtype: torch.dtype | None
    stored: torch.dtype
    device: torch.device
    seed: int
    steps: tuple[Step, ...]
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

    def to_json(self) -> dict[str, Any]:
        """The plan, ready for JSON."""
        return {
            "adapter": self.source.ref,
            "dialect": self.source.dialect,
            "to": self.to,
            "options": self.options,
            "device": str(self.device),
            "read_bytes": self.source.nbytes,
            "modules": [{"name": s.name, "action": s.action, "reason": s.reason} for s in self.steps],
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
    device: str = "auto",
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
    if source.adapter.weights:
        named_for(source.adapter, source.dialect, to, component)  # refuses now what would be refused at the end
    return ConvertPlan(
        source,
        opened,
        to,
        experts,
        dora == "fold",
        component,
        rule,
        wanted,
        wanted or _stored(source),
        resources(device=device).device,
        seed,
        tuple(_steps(source, to, dora == "fold", opened)),
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


def _steps(source: Source, to: str, fold: bool, base: Base | None):
    """One step for every changed parameter.

    Raises:
        UsageError: a difference that no factors hold and the dialect has no place for.
    """
    if source.variant is not None:
        for site in source.variant.sites:
            yield Step(f"{site.module}.weight", "compute", str(site.config.get("peft_type")))
    for name, weight in source.adapter.weights.items():
        yield Step(name, "fold" if fold and weight.magnitude is not None else "copy")
    for name, difference in source.adapter.added.items():
        if to in HOLDS_ADDED:
            yield Step(name, "copy", "a difference in full")
        elif difference.ndim > 1:
            yield Step(name, "decompose", "a difference in full")
        elif to == "peft" and base is not None:
            yield Step(name, "add", "a difference of a vector: PEFT replaces it whole")
        else:
            places = "give --base, or convert to" if to == "peft" else "convert to"
            raise UsageError(f"{name}: is a difference of a vector, which {to} has no place for; {places} lycoris")


def as_kind(difference: Tensor, parameter: Parameter | None) -> Kind:
    """How a difference in full maps to a matrix: as the base says, or by its axes."""
    if parameter is not None:
        return parameter.kind
    return Kind.LINEAR if difference.ndim == 2 else Kind.CONVOLUTION
