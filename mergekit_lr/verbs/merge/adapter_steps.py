"""What a merge of adapters does to every parameter: a step for each part of it, with the method's arguments."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.recipe.parameters import arguments, renamed
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.merge.adapter_parts import Given, Step, check_sizes, known_parameter
from mergekit_lr.verbs.merge.adapter_sources import Opened, parameter_of
from mergekit_lr.verbs.merge.adapter_values import values_of
from mergekit_lr.verbs.merge.sources import layers_of


def steps_of(recipe: Recipe, opened: Sequence[Opened], base: Base | None) -> list[Step]:
    """Every step of a merge, those of ``targets`` only, in the base's order where there is a base.

    Raises:
        MismatchError: adapters of different bases, or a value that one of them lacks while there is no base.
    """
    found = [*_changes(opened, base), *values_of(opened, base)]
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
        parameter = known_parameter(opened, base, name)
        held = [one.adapter.weights.get(name) for one in opened]
        lead = next((weight for weight in held if weight is not None), None)
        kind = parameter.kind if parameter is not None else lead.kind if lead is not None else None
        given = tuple(_difference(one, name, kind) for one in opened)
        shape = next((w.shape for w in held if w is not None and w.shape is not None), None)
        known = next((x for x in given if isinstance(x, LowRank | Tensor)), None)
        size = tuple(known.shape) if known is not None else _matrix(parameter)
        full = next((one.adapter.added[name] for one in opened if name in one.adapter.added), None)
        own = parameter.shape if parameter is not None else shape or (tuple(full.shape) if full is not None else None)
        check_sizes(opened, given, size, name)
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


def _matrix(parameter: Parameter | None) -> tuple[int, ...]:
    """The size of a change that is still to be computed, of which the base's parameter is known."""
    assert parameter is not None
    if parameter.kind is Kind.VECTOR:
        return tuple(parameter.shape)
    return (*((parameter.matrices,) if parameter.matrices > 1 else ()), *parameter.matrix_shape)
