"""The adapters of a recipe, opened: what each of them does to which parameter, under names that all share.

Most of it is read as it is: factors, tensors in full, token rows. A change that has to be computed (another of PEFT's
types, or a DoRA that is folded into a difference) is a function, called when its turn comes, so no more than the
changes of one parameter are in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import TypeAlias

from torch import Tensor

from mergekit_lr.adapter import experts
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.adapter.variants import Variant
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.checkpoint.parameter import Parameter
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.methods.delta import Delta
from mergekit_lr.verbs.adapter_source import Base, Source, open_source

# Gives the change of one parameter as factors or as a matrix (d_out, d_in), or a vector; None where there is none.
Made: TypeAlias = Callable[[], Delta | None]
KEPT = ("task_type", "revision", "alora_invocation_tokens")  # fields of a configuration that stay true of a merge


@dataclass(frozen=True, eq=False)
class Opened:
    """One adapter.

    ref: what the recipe calls it. adapter: all that is read as it is. dialect: of its file. kind: PEFT's type, for
    messages. files: that it was read from. made: parameter to the change that is computed.
    """

    ref: str
    adapter: Adapter
    dialect: str
    kind: str
    files: tuple[Path, ...]
    made: dict[str, Made] = field(default_factory=dict)

    @property
    def changed(self) -> list[str]:
        """Every parameter that it changes by a difference, in factors or in full."""
        return list(dict.fromkeys([*self.adapter.weights, *self.made, *self.adapter.added]))


def open_adapters(
    refs: Sequence[str], given: Mapping[str, Adapter], base: Base | None, *, fold: bool, fuse: bool
) -> tuple[Opened, ...]:
    """Open the adapters ``refs``, those in ``given`` from memory, and bring them under common names.

    Args:
        refs: in the recipe's order. base: the model that they are of. fold: take every DoRA as the difference that it
            makes, which needs ``base``. fuse: put single experts together into the stacks of the base.

    Raises:
        UsageError: an adapter that needs its base, or dialects that do not go together. FormatError: not readable.
    """
    opened = [_opened(ref, given.get(ref, ref), base) for ref in refs]
    _refuse_activated(opened)
    dialect = next((one.dialect for one in opened if one.dialect != "peft"), "peft")
    opened = [_renamed(one, dialect) for one in opened]
    layout = base.layout if base is not None else None
    if fuse or any(experts.is_fused(one.adapter) for one in opened):
        opened = [replace(one, adapter=experts.fuse(one.adapter, layout)) for one in opened]
    return tuple(_folded(one, base) if fold and base is not None else one for one in opened)


def parameter_of(base: Base | None, name: str) -> Parameter | None:
    """The base's parameter ``name``, with or without the component that picture models' adapters put before it."""
    if base is None:
        return None
    known = base.layout.by_name
    return known.get(name) or known.get(name.partition(".")[2])


def _opened(ref: str, given: str | Adapter, base: Base | None) -> Opened:
    try:
        source = open_source(given, base)
    except UsageError as problem:
        raise UsageError(str(problem).replace("give --base", "give base_model")) from None
    adapter, made = source.adapter, _computed(source)
    if not (adapter.weights or adapter.saved or adapter.added or adapter.token_rows or made):
        raise UsageError(f"{ref}: changes nothing, so there is nothing to merge")
    kind = str(source.variant.config.get("peft_type")) if source.variant is not None else "LORA"
    return Opened(ref, adapter, source.dialect, kind, _files(source.path), made)


def _files(path: Path | None) -> tuple[Path, ...]:
    if path is None:
        return ()
    return tuple(sorted(path.glob("adapter_*"))) if path.is_dir() else (path,)


def _computed(source: Source) -> dict[str, Made]:
    variant = source.variant
    if variant is None:
        return {}
    made: dict[str, Made] = {}
    for site in variant.sites:
        one = replace(variant, sites=(site,))
        names = [f"{site.module}.weight"]
        names += [f"{site.module}.bias"] if hasattr(variant.method, "bias_delta_of") else []
        made |= {name: partial(_delta, one, name) for name in names if name in variant.parameters}
    return made


def _delta(variant: Variant, name: str) -> Delta | None:
    """The change of ``name`` under a variant of one module."""
    return next((delta for changed, delta in variant.deltas() if changed == name), None)


def _renamed(one: Opened, dialect: str) -> Opened:
    """Names with the component in front, as picture tools have them, where any of the adapters is such a tool's."""
    if one.dialect == dialect or dialect == "peft" or one.dialect != "peft":
        return replace(one, dialect=dialect)
    if one.made:
        raise UsageError(f"{one.ref}: of type {one.kind}, beside a {dialect} file; convert it to {dialect} first")
    return replace(one, adapter=named_for(one.adapter, "peft", dialect).adapter, dialect=dialect)


def _folded(one: Opened, base: Base) -> Opened:
    """Every DoRA as the difference that it makes; the bias of its layer on its own."""
    dora = {name: weight for name, weight in one.adapter.weights.items() if weight.magnitude is not None}
    if not dora:
        return one
    added, made = dict(one.adapter.added), dict(one.made)
    for name, weight in dora.items():
        parameter = parameter_of(base, name)
        if parameter is None:
            raise MismatchError(f"{one.ref}: changes {name}, which the base_model does not have; is it of another?")
        made[name] = partial(_rescaled, base, parameter, weight)
        if weight.bias is not None:
            added[f"{parameter.module}.bias"] = weight.bias.float() * weight.delta.scaling
    plain = {name: weight for name, weight in one.adapter.weights.items() if name not in dora}
    return replace(one, adapter=replace(one.adapter, weights=plain, added=added), made=made)


def _rescaled(base: Base, parameter: Parameter, weight: AdaptedWeight) -> Delta:
    magnitude: Tensor | None = weight.magnitude
    assert magnitude is not None
    return rescaled(as_matrix(base.read(parameter), parameter.kind), weight.delta, magnitude)


def _refuse_activated(opened: Sequence[Opened]) -> None:
    """An activated LoRA acts behind its own tokens only; merged with others it would act elsewhere."""
    tokens = [one.adapter.config.get("alora_invocation_tokens") for one in opened]
    for one, own in zip(opened, tokens, strict=True):
        if own and any(other != own for other in tokens):
            raise UsageError(
                f"{one.ref}: is an activated LoRA, which acts behind its own tokens only; it merges only with others "
                "of the same alora_invocation_tokens"
            )
