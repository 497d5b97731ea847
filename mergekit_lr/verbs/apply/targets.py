"""Which parameters change and how, once the adapters are opened: every end of a tie, and what becomes of the tie.

A tie is kept where all of its ends change alike. Where they do not (a LoRA on the input table of a model whose head
shares it changes the table alone), one tensor cannot be both: the other end gets a tensor of its own. PEFT's
``merge_and_unload`` changes the head along, and so gives another model than the adapter on its base.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter
from mergekit_lr.errors import UsageError
from mergekit_lr.verbs.apply.adapters import Given
from mergekit_lr.verbs.apply.change import Change, own_factors


@dataclass(frozen=True, eq=False)
class Target:
    """A parameter that gets new values, or a tensor of its own.

    parameter: its blocks name the base's tensors. changes: by the adapters, in their order; none where it is only
    untied. names: tensor of the base to the tensor of the output, where the two differ. fresh: the base has no such
    parameter, or one of another shape: the result is what the one change saved.
    """

    parameter: Parameter
    changes: tuple[Change, ...]
    names: dict[str, str]
    fresh: bool = False

    @property
    def name(self) -> str:
        """The parameter's name in memory."""
        return self.parameter.name

    @property
    def whole(self) -> bool:
        """Whether a matrix of it has to be done at once."""
        return any(change.whole(self.parameter.kind) for change in self.changes)

    @property
    def how(self) -> str:
        """In a word or two, what the adapters do to it."""
        words = []
        for change in self.changes:
            words += ["in full"] if change.saved is not None else []
            words += ["DoRA"] if change.magnitude is not None else ["factors"] if change.delta is not None else []
            words += ["difference"] if change.added is not None or change.made is not None else []
            words += ["rows"] if change.rows is not None else []
        return ", ".join(dict.fromkeys(words)) or "untied"


class Targets(NamedTuple):
    """changing: in the order of the layout. untied: names of those that got a tensor of their own."""

    changing: tuple[Target, ...]
    untied: tuple[str, ...]


def targets(layout: Layout, given: Sequence[Given]) -> Targets:
    """What changes when all adapters in ``given`` are applied together.

    Raises:
        UsageError: a parameter that the base lacks, or that grows, is given by more than one adapter or with a weight.
    """
    changes: dict[str, tuple[Change, ...]] = {}
    for adapter in given:
        for name, change in adapter.changes.items():
            changes[name] = (*changes.get(name, ()), change)
    tied = {end.name for end in layout.tied}
    untied: list[str] = []
    made: list[Target] = []
    for parameter in layout.parameters:
        name = parameter.name
        ends = layout.ends(name)
        if name in changes:
            made.append(_target(parameter, changes[name], {}))
        for end in ends[1:]:
            if not alike(parameter, changes.get(name, ()), end, changes.get(end.name, ())):
                untied.append(end.name)
                names = {block.tensor: end.name for blocks in end.blocks for block in blocks}
                made.append(_target(end, changes.get(end.name, ()), names))
    known = {parameter.name for parameter in layout.parameters} | tied
    for name in changes.keys() - known:
        saved = changes[name][0].saved
        assert saved is not None  # nothing else is accepted for a parameter that the base leaves out
        kind = Kind.LINEAR if saved.ndim == 2 else Kind.VECTOR
        made.append(_target(Parameter(name, kind, (), ((Block(name),),)), changes[name], {}))
    return Targets(tuple(made), tuple(untied))


def _target(parameter: Parameter, changes: tuple[Change, ...], names: dict[str, str]) -> Target:
    saved = next((change.saved for change in changes if change.saved is not None), None)
    if saved is None or tuple(saved.shape) == parameter.shape:
        return Target(parameter, changes, names)
    change, *others = changes
    if others or change.weight != 1:
        raise UsageError(
            f"{parameter.name}: an adapter brings {list(saved.shape)} where the base has {list(parameter.shape)}; that "
            "can be taken over from one adapter with weight 1, not summed"
        )
    blocks = ((Block(names.get(parameter.blocks[0][0].tensor, parameter.blocks[0][0].tensor)),),)
    return Target(replace(parameter, shape=tuple(saved.shape), blocks=blocks), changes, {}, fresh=True)


def alike(one: Parameter, changes: Sequence[Change], other: Parameter, others: Sequence[Change]) -> bool:
    """Whether two ends of a tie end with the same values."""
    return len(changes) == len(others) and all(
        _same(one.kind, a, other.kind, b) for a, b in zip(changes, others, strict=True)
    )


def _same(one: Kind, a: Change, other: Kind, b: Change) -> bool:
    if a is b:
        return True
    plain = all(c.magnitude is None and c.made is None for c in (a, b))
    return plain and a.weight == b.weight and _equal(_content(one, a), _content(other, b))


def _content(kind: Kind, change: Change) -> list[Any]:
    """All that the change is made of, factors in the weight's own layout."""
    factors = (None, None, None)
    if change.delta is not None:
        factors = (*own_factors(change.delta, kind, 0), change.delta.scaling)
    indices, rows = change.rows or (None, None)
    return [*factors, change.added, change.saved, indices, rows]


def _equal(one: list[Any], other: list[Any]) -> bool:
    return all(
        torch.equal(a, b) if isinstance(a, Tensor) and isinstance(b, Tensor) and a.shape == b.shape else
        not isinstance(a, Tensor) and not isinstance(b, Tensor) and a == b
        for a, b in zip(one, other, strict=True)
    )  # fmt: skip
