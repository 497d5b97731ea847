"""What a merge of adapters does to each parameter, one step for every part that an adapter can hold of it.

The parts, and what stands in for an adapter that leaves a parameter alone:

- ``change``: a difference of the weight, as factors (d_out, d_in) or in full. None is a difference of zero.
- ``bias``: what a LoRA layer adds to its bias (``lora_bias``), a difference likewise.
- ``saved``: a replacement in full (``modules_to_save``, biases), in the parameter's own shape.
- ``rows``: replaced rows of a table (``trainable_token_indices``), for all rows that any adapter trained.
- ``magnitude``: DoRA's lengths of rows.

The last three are values and no differences. With the base they are merged as differences from what it has there,
so an adapter that lacks one counts as the base's. Without the base their weighted mean is taken (methods.md 4.5), for
which every adapter needs one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import MismatchError
from mergekit_lr.methods.delta import Delta
from mergekit_lr.recipe.parameters import arguments, renamed
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.merge.adapter_sources import Made, Opened, parameter_of
from mergekit_lr.verbs.merge.sources import layers_of

PartName: TypeAlias = Literal["change", "bias", "saved", "rows", "magnitude"]
Given: TypeAlias = LowRank | Tensor | Made | None


@dataclass(frozen=True, eq=False)
class Step:
    """One part of one parameter.

    name: of the parameter. kind, shape: of its weight, the shape where it is known. size: of what is merged, (..., m,
    n) for a matrix in the layout of ``nn.Linear``, (n,) for a vector. given: by each adapter; None where it has none.
    arguments: of the method. origin: the base's parameter that a value replaces. rows: of a table.
    """

    name: str
    part: PartName
    kind: Kind
    shape: tuple[int, ...] | None
    size: tuple[int, ...]
    given: tuple[Given, ...]
    arguments: dict[str, Any]
    origin: Parameter | None = None
    rows: tuple[int, ...] = ()

    @property
    def label(self) -> str:
        """Its name in the journal and the report."""
        return self.name if self.part == "change" else f"{self.name} ({self.part})"

    @property
    def factored(self) -> bool:
        """Whether all that is given are factors."""
        return self.part == "change" and all(one is None or isinstance(one, LowRank) for one in self.given)

    @property
    def averaged(self) -> bool:
        """Whether the values are averaged, for want of a base that they could differ from."""
        return self.part in ("saved", "rows", "magnitude") and self.origin is None

    def zero(self) -> Delta:
        """The difference that stands for None."""
        if len(self.size) < 2:
            return torch.zeros(self.size)
        *lead, m, n = self.size
        return LowRank(torch.zeros(*lead, 0, n), torch.zeros(*lead, m, 0))


def steps_of(recipe: Recipe, opened: Sequence[Opened], base: Base | None) -> list[Step]:
    """Every step of a merge, those of ``targets`` only, in the base's order where there is a base.

    Raises:
        MismatchError: adapters of different bases, or a value that one of them lacks while there is no base.
    """
    found = [*_changes(opened, base), *_values(opened, base)]
    order = {name: i for i, name in enumerate(base.layout.by_name)} if base is not None else {}
    first = {step.name: i for i, step in reversed(list(enumerate(found)))}
    found.sort(key=lambda step: (order.get(_bare(step, base), len(order)), first[step.name]))
    layers = layers_of({step.name: (torch.float32, ()) for step in found}, {})
    scopes = [renamed(entry.parameters) for entry in recipe.document.adapters or ()]
    made = []
    for step in found:
        layer = layers.of(step.name)
        t = 0.0 if layer is None else layer / (layers.count - 1) if layers.count > 1 else 1.0
        names = [step.name] * len(step.given)
        own = arguments(recipe.method, scopes, [recipe.shared], names, step.name, t)
        made.append(replace(step, arguments=own))
    return made


def _bare(step: Step, base: Base | None) -> str:
    parameter = parameter_of(base, step.name)
    return parameter.name if parameter is not None else step.name


def _changes(opened: Sequence[Opened], base: Base | None) -> Iterable[Step]:
    """Differences of weights and of vectors, and with them the biases of their layers."""
    for name in dict.fromkeys(name for one in opened for name in one.changed):
        parameter = _known(opened, base, name)
        held = [one.adapter.weights.get(name) for one in opened]
        lead = next((weight for weight in held if weight is not None), None)
        kind = parameter.kind if parameter is not None else lead.kind if lead is not None else None
        given = tuple(_difference(one, name, kind) for one in opened)
        shape = next((w.shape for w in held if w is not None and w.shape is not None), None)
        known = next((x for x in given if isinstance(x, LowRank | Tensor)), None)
        size = tuple(known.shape) if known is not None else _matrix(parameter)
        full = next((one.adapter.added[name] for one in opened if name in one.adapter.added), None)
        own = parameter.shape if parameter is not None else shape or (tuple(full.shape) if full is not None else None)
        _same_size(opened, given, size, name)
        kind = kind or (Kind.VECTOR if len(size) < 2 else Kind.CONVOLUTION if len(own or ()) > 2 else Kind.LINEAR)
        yield Step(name, "change", kind, own, size, given, {})
        if any(weight is not None and weight.bias is not None for weight in held):
            biases = tuple(w.bias.float() * w.delta.scaling if w and w.bias is not None else None for w in held)
            yield Step(name, "bias", kind, own, size[-2:-1], biases, {})


def _difference(one: Opened, name: str, kind: Kind | None) -> Given:
    """The change of ``name`` by one adapter; a difference in full as a matrix in the layout of ``nn.Linear``."""
    if name in one.made:
        return one.made[name]
    if name in one.adapter.weights:
        return one.adapter.weights[name].delta
    tensor = one.adapter.added.get(name)
    if tensor is None or tensor.ndim < 2:
        return tensor
    return as_matrix(tensor, kind or (Kind.LINEAR if tensor.ndim == 2 else Kind.CONVOLUTION))


def _values(opened: Sequence[Opened], base: Base | None) -> Iterable[Step]:
    """Tensors in full, token rows and DoRA's magnitudes."""
    full = list(dict.fromkeys(name for one in opened for name in one.adapter.saved))
    for name in full:
        parameter = _known(opened, base, name)
        shape = next(tuple(one.adapter.saved[name].shape) for one in opened if name in one.adapter.saved)
        # A table of another length than the base's has no values there to differ from.
        origin = parameter if parameter is not None and tuple(parameter.shape) == shape else None
        values = tuple(_in_full(one, name, base, origin) for one in opened)
        if origin is None and all(name in one.adapter.weights for one in opened if name in one.adapter.saved):
            copy = next(value for value in values if value is not None)  # PEFT saves a table along with its factors
            values = tuple(copy if value is None else value for value in values)
        kind = parameter.kind if parameter is not None else Kind.OTHER
        yield _value(opened, Step(name, "saved", kind, shape, shape, values, {}, origin))
    for name in dict.fromkeys(name for one in opened for name in one.adapter.token_rows if name not in full):
        yield _table(opened, base, name)
    weights = [one.adapter.weights for one in opened]
    for name in dict.fromkeys(n for own in weights for n, weight in own.items() if weight.magnitude is not None):
        parameter = _known(opened, base, name)
        held = [own.get(name) for own in weights]
        lead = next(weight for weight in held if weight is not None and weight.magnitude is not None)
        assert lead.magnitude is not None
        size = tuple(lead.magnitude.shape)
        origin = None if len(size) == 2 and size[0] == 1 else parameter  # lengths of columns are LyCORIS' own
        given = tuple(_lengths(weight, base, origin) for weight in held)
        yield _value(opened, Step(name, "magnitude", lead.kind, lead.shape, size, given, {}, origin))


def _lengths(weight: AdaptedWeight | None, base: Base | None, origin: Parameter | None) -> Tensor | Made | None:
    """DoRA's magnitude; of a plain LoRA the lengths that its rows have, of which it changes nothing."""
    if weight is None or weight.magnitude is not None:
        return weight.magnitude if weight is not None else None
    if base is None or origin is None:
        return None
    return lambda: row_lengths(as_matrix(base.read(origin), origin.kind), weight.delta)


def row_lengths(matrix: Tensor, delta: LowRank | None = None) -> Tensor:
    """The lengths (d_out,) of the rows of a weight (d_out, d_in), changed by ``delta``; float64 sums."""
    changed = matrix.float() if delta is None else matrix.float() + delta.dense()
    return changed.double().square().sum(1).sqrt().float()


def _in_full(one: Opened, name: str, base: Base | None, origin: Parameter | None) -> Tensor | Made | None:
    """An adapter's replacement of a tensor; of one that trains rows of it, the base's with those rows."""
    if name in one.adapter.saved:
        return one.adapter.saved[name]
    if name not in one.adapter.token_rows or base is None or origin is None:
        return None
    return partial(_with_rows, base, origin, *one.adapter.token_rows[name])


def _with_rows(base: Base, table: Parameter, indices: Sequence[int], rows: Tensor) -> Tensor:
    """The base's table with some rows replaced, in float32."""
    return base.read(table).float().index_copy(0, torch.tensor(indices), rows.float())


def _table(opened: Sequence[Opened], base: Base | None, name: str) -> Step:
    """Token rows: all that any adapter trained; without a base all must have trained the same."""
    parameter = _known(opened, base, name)
    held = [one.adapter.token_rows.get(name) for one in opened]
    lead = next(own for own in held if own is not None)
    rows = tuple(sorted({row for own in held if own is not None for row in own[0]}))
    given = tuple(_among(own, rows, base, parameter) if own else None for own in held)
    for one, values in zip(opened, given, strict=True):
        if parameter is None and values is None:
            raise MismatchError(
                f"{name}: {one.ref} does not train all of its token rows that others do; give base_model, whose rows "
                "then count for those missing"
            )
    shape = parameter.shape if parameter is not None else None
    return Step(name, "rows", Kind.EMBEDDING, shape, (len(rows), lead[1].shape[1]), given, {}, parameter, rows)


def _among(
    own: tuple[list[int], Tensor], rows: tuple[int, ...], base: Base | None, table: Parameter | None
) -> Tensor | Made | None:
    """An adapter's rows at their places among all ``rows``, between the base's where it has not trained all."""
    indices, values = own
    if set(indices) == set(rows):
        return values[[indices.index(row) for row in rows]]
    if base is None or table is None:
        return None
    return lambda: _with_rows(base, table, indices, values)[list(rows)]


def _value(opened: Sequence[Opened], step: Step) -> Step:
    """``step``, if every adapter has the value, or there is a base that stands in for it."""
    what = {"saved": "saved in full", "magnitude": "with a DoRA magnitude"}[step.part]
    _same_size(opened, step.given, step.size, step.name)
    for one, value in zip(opened, step.given, strict=True):
        if value is None and step.origin is None:
            raise MismatchError(
                f"{step.name}: is {what} in some adapters and not in {one.ref}; give a base_model that has it, whose "
                "values then count there, or leave it out with targets: exclude"
            )
    return step


def _known(opened: Sequence[Opened], base: Base | None, name: str) -> Parameter | None:
    """The base's parameter of this name; None without a base, and for what the base leaves to chance."""
    found = parameter_of(base, name)
    if base is None or found is not None or name in base.layout.missing or name in base.checkpoint.tensors:
        return found
    ref = next(one.ref for one in opened if name in (*one.changed, *one.adapter.saved, *one.adapter.token_rows))
    raise MismatchError(f"{ref}: changes {name}, which the base_model does not have; is it of another?")


def _matrix(parameter: Parameter | None) -> tuple[int, ...]:
    """The size of a change that is still to be computed, of which the base's parameter is known."""
    assert parameter is not None
    if parameter.kind is Kind.VECTOR:
        return tuple(parameter.shape)
    return (*((parameter.matrices,) if parameter.matrices > 1 else ()), *parameter.matrix_shape)


def _same_size(opened: Sequence[Opened], given: Sequence[Given | Callable], size: tuple[int, ...], name: str) -> None:
    for one, own in zip(opened, given, strict=True):
        if isinstance(own, LowRank | Tensor) and tuple(own.shape) != size:
            raise MismatchError(
                f"{name} has a change of shape {list(own.shape)} in {one.ref} and {list(size)} in another adapter: "
                "they are of different bases"
            )
