"""A LoRA on mixtures of experts, both ways: on the stacks that a model holds in memory, or on single experts.

Fused: ``experts.gate_up_proj`` with factors A (E, r, d_in), B (E, d_out, r). Per expert: ``experts.3.gate_proj``
and ``experts.3.up_proj`` with a pair of factors each, as checkpoints name them on disk and servers want them.
Splitting is exact: gate and up get the same A and their own rows of B. Fusing is exact as well: where gate and up
share A the rows of B are joined again, else A is stacked and B is block diagonal, with the sum of both ranks.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import MismatchError, UsageError

STACKS = (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED)
# Without the base: the names that most mixtures of experts have on disk.
PARTS = {"gate_up_proj": ("gate_proj", "up_proj"), "down_proj": ("down_proj",)}
_SINGLE = re.compile(r"(?P<stack>.+\.experts)\.(?P<expert>\d+)\.(?P<part>gate_proj|up_proj|down_proj)\.weight")


class Place(NamedTuple):
    """Where a single expert's weight belongs: expert, and part of how many, of the stack ``name``."""

    name: str
    expert: int
    part: int
    parts: int


def is_fused(adapter: Adapter) -> bool:
    """Whether the adapter has factors on a stack of experts."""
    return any(weight.kind in STACKS for weight in adapter.weights.values())


def split(adapter: Adapter, layout: Layout | None = None) -> Adapter:
    """The same change with one LoRA for each expert and projection.

    Args:
        adapter: what to split. layout: the base, whose names on disk the experts get; without it they are called
            gate_proj, up_proj and down_proj.

    Raises:
        UsageError: single experts of this stack have no names.
    """
    weights: dict[str, AdaptedWeight] = {}
    for name, weight in adapter.weights.items():
        weights |= dict(_singles(name, weight, layout)) if weight.kind in STACKS else {name: weight}
    return replace(adapter, weights=weights)


def fuse(adapter: Adapter, layout: Layout | None = None) -> Adapter:
    """The same change with the factors of all experts of a layer in one stack.

    Args:
        adapter: what to fuse. layout: the base, which says how its experts are stacked; without it the stacks are
            gate_up_proj and down_proj, as transformers has them.

    Raises:
        MismatchError: an expert has what a stack cannot hold, or experts differ in shape.
    """
    known = _places(layout)
    weights: dict[str, AdaptedWeight] = {}
    groups: dict[str, dict[Place, AdaptedWeight]] = defaultdict(dict)
    for name, weight in adapter.weights.items():
        place = known.get(name) if layout is not None else _place_by_name(name)
        if place is None:
            weights[name] = weight
            continue
        if weight.bias is not None or weight.magnitude is not None:
            raise MismatchError(f"{name}: PEFT holds no bias and no DoRA magnitude on a stack of experts")
        groups[place.name][place] = weight
    for name, members in groups.items():
        weights[name] = _stacked(name, members, layout.by_name[name] if layout is not None else None)
    return replace(adapter, weights=weights)


def padded(factor: Tensor, rank: int, axis: int) -> Tensor:
    """``factor`` with zeros behind it along ``axis`` up to ``rank``: the product does not change."""
    missing = list(factor.shape)
    missing[axis] = rank - factor.shape[axis]
    return torch.cat([factor, factor.new_zeros(missing)], axis) if missing[axis] else factor


def _singles(name: str, weight: AdaptedWeight, layout: Layout | None) -> Iterator[tuple[str, AdaptedWeight]]:
    delta = weight.delta
    for expert, names in enumerate(_names(name, len(delta.A), layout)):
        A, B = delta.A[expert], delta.B[expert]
        if B.shape[0] % len(names):
            raise MismatchError(f"{name}: {B.shape[0]} rows cannot be cut in {len(names)} equal projections")
        for single, rows in zip(names, B.chunk(len(names)), strict=True):
            shape = (rows.shape[0], A.shape[1])
            yield single, AdaptedWeight(Kind.LINEAR, LowRank(A, rows.contiguous(), delta.scaling), shape)


def _names(name: str, experts: int, layout: Layout | None) -> list[list[str]]:
    """For each expert of a stack the names of its projections."""
    module, _, leaf = name.rpartition(".")
    if layout is None:
        if leaf not in PARTS or not module.endswith(".experts"):
            raise UsageError(f"{name}: how single experts of this stack are called is not known; give --base")
        return [[f"{module}.{expert}.{part}.weight" for part in PARTS[leaf]] for expert in range(experts)]
    parameter = layout.by_name.get(name)
    if parameter is None:
        raise MismatchError(f"the base has no parameter {name}, which the adapter changes: is it another base?")
    if any(block.index is not None or block.rows is not None for blocks in parameter.blocks for block in blocks):
        raise UsageError(f"{name}: the base holds its experts as one stack, so single ones have no names to go by")
    return [[block.tensor for block in blocks] for blocks in parameter.blocks]


def _places(layout: Layout | None) -> dict[str, Place]:
    """Name on disk of every single expert's weight to its place in a stack."""
    return {
        block.tensor: Place(parameter.name, expert, part, len(blocks))
        for parameter in (layout.parameters if layout is not None else ())
        if parameter.kind in STACKS
        for expert, blocks in enumerate(parameter.blocks)
        for part, block in enumerate(blocks)
        if block.index is None
    }


def _place_by_name(name: str) -> Place | None:
    match = _SINGLE.fullmatch(name)
    if match is None:
        return None
    leaf = next(leaf for leaf, parts in PARTS.items() if match["part"] in parts)
    parts = PARTS[leaf]
    return Place(f"{match['stack']}.{leaf}", int(match["expert"]), parts.index(match["part"]), len(parts))


def _stacked(name: str, members: dict[Place, AdaptedWeight], parameter: Parameter | None) -> AdaptedWeight:
    """One stack from its single weights; experts that the adapter leaves alone get zeros."""
    first = next(iter(members))
    experts = parameter.matrices if parameter is not None else 1 + max(place.expert for place in members)
    shapes = {tuple(weight.delta.shape) for weight in members.values()}
    scalings = {weight.delta.scaling for weight in members.values()}
    common = scalings.pop() if len(scalings) == 1 else None
    if len(shapes) > 1:
        raise MismatchError(f"{name}: its experts have different shapes, {' and '.join(map(str, sorted(shapes)))}")
    table = {
        (place.expert, place.part): weight.delta if common is not None else weight.delta.folded()
        for place, weight in members.items()
    }
    grid = [[table.get((expert, part)) for part in range(first.parts)] for expert in range(experts)]
    shared = _shared(grid)
    joined = [_joined(row, next(iter(shapes)), shared) for row in grid]
    rank = max(A.shape[0] for A, _ in joined)
    A = torch.stack([padded(A, rank, 0) for A, _ in joined])
    B = torch.stack([padded(B, rank, 1) for _, B in joined])
    kind = parameter.kind if parameter is not None else Kind.EXPERTS
    shape = parameter.shape if parameter is not None else (experts, B.shape[1], A.shape[2])
    return AdaptedWeight(kind, LowRank(A, B, 1.0 if common is None else common), shape)


def _shared(grid: list[list[LowRank | None]]) -> bool:
    """Whether in every expert all projections have the same A, as after a split."""
    return all(
        (first := row[0]) is not None and all(part is not None and torch.equal(part.A, first.A) for part in row)
        for row in grid
    )


def _joined(row: list[LowRank | None], shape: tuple[int, ...], shared: bool) -> tuple[Tensor, Tensor]:
    """A and B of one expert's projections, one below the other."""
    parts = [part for part in row if part is not None]
    if shared:
        return parts[0].A, torch.cat([part.B for part in parts])
    if not parts:
        return torch.zeros(0, shape[1]), torch.zeros(len(row) * shape[0], 0)
    A = torch.cat([part.A for part in parts])
    B = parts[0].B.new_zeros(len(row) * shape[0], A.shape[0])
    column = 0
    for index, part in enumerate(row):
        if part is not None:
            B[index * shape[0] : (index + 1) * shape[0], column : column + part.rank] = part.B
            column += part.rank
    return A, B
