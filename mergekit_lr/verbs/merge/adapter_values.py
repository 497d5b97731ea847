"""Values that adapters put in the place of the base's: tensors in full, token rows and DoRA's magnitudes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import MismatchError
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.merge.adapter_parts import Step, check_sizes, known_parameter
from mergekit_lr.verbs.merge.adapter_sources import Made, Opened


def values_of(opened: Sequence[Opened], base: Base | None) -> Iterable[Step]:
    """The steps of all values; their arguments are still to be found.

    Raises:
        MismatchError: an adapter lacks a value that others have, and there is no base that has it.
    """
    full = list(dict.fromkeys(name for one in opened for name in one.adapter.saved))
    for name in full:
        parameter = known_parameter(opened, base, name)
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
        parameter = known_parameter(opened, base, name)
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
    parameter = known_parameter(opened, base, name)
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
    check_sizes(opened, step.given, step.size, step.name)
    for one, value in zip(opened, step.given, strict=True):
        if value is None and step.origin is None:
            raise MismatchError(
                f"{step.name}: is {what} in some adapters and not in {one.ref}; give a base_model that has it, whose "
                "values then count there, or leave it out with targets: exclude"
            )
    return step
