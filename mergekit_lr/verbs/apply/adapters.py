"""Adapters opened onto a base: what each does to which parameter, checked against the base's names and shapes."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.open import open_adapter, read_variant
from mergekit_lr.adapter.variants.reading import Variant
from mergekit_lr.adapter.variants.residual import method_of
from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.checkpoint.hub import local_path
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.pair import read_whole
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter
from mergekit_lr.errors import FormatError, LrmergeError, MismatchError, UsageError
from mergekit_lr.verbs.apply.change import Change

# Parts of a picture model, which kohya's and diffusers' names begin with and the part's own checkpoint does not.
COMPONENTS = ("unet", "transformer", "diffusion_model", "text_encoder", "text_encoder_2", "text_encoder_3")

Reference = str | Path | Adapter


@dataclass(frozen=True, eq=False)
class Given:
    """One adapter of a run.

    ref: what the user called it. files: those it was read from, none in memory. changes: parameter in memory, every
    end of a tie on its own, to what happens to it. notes: what a user should know.
    """

    ref: str
    weight: float
    dialect: str
    files: tuple[Path, ...]
    changes: dict[str, Change]
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class _Read:
    """An adapter as its file gives it. made: of which parameters a variant computes the change when asked.
    replaced: ends of paths of the modules that are replaced each on its own (``modules_to_save``)."""

    adapter: Adapter
    dialect: str
    files: tuple[Path, ...] = ()
    made: dict[str, Variant] = field(default_factory=dict)
    replaced: tuple[str, ...] = ()


def pairs(adapters: Iterable[Reference | tuple[Reference, float]]) -> list[tuple[Reference, float]]:
    """Every adapter with its weight, 1 where none was given.

    Raises:
        UsageError: no adapter, or a weight that is no finite number.
    """
    found = [given if isinstance(given, tuple) else (given, 1.0) for given in adapters]
    if not found:
        raise UsageError("no adapter given; name one or more, each with a weight where it is not 1: my-lora:0.7")
    for ref, weight in found:
        if isinstance(weight, bool) or not isinstance(weight, int | float) or not math.isfinite(weight):
            raise UsageError(f"{_called(ref)}: its weight is {weight!r}, expected a finite number")
    return [(ref, float(weight)) for ref, weight in found]


def open_onto(base: Checkpoint, layout: Layout, ref: Reference, weight: float, *, unmerge: bool = False) -> Given:
    """Open the adapter ``ref`` for ``base``, to be added ``weight`` times, or taken out with ``unmerge``.

    Raises:
        FormatError: it cannot be read. MismatchError: it names a parameter that the base lacks, or of another shape.
        UsageError: with ``unmerge``, a change that cannot be taken out again.
    """
    called = _called(ref)
    read = _read(base, layout, ref, called)
    collected = _Collected(base, layout, called, -weight if unmerge else weight)
    adapter = read.adapter
    for name, adapted in adapter.weights.items():
        collected.factors(name, adapted)
    for name, difference in adapter.added.items():
        collected.put(name, added=_fit(difference, collected.parameter(name), called))
    for name, variant in read.made.items():
        one = collected.parameter(name).name
        collected.put(name, made=lambda variant=variant, one=one: _delta(variant, one))
    for name, tensor in adapter.saved.items():
        collected.replace(name, tensor, alone=name.rpartition(".")[0].endswith(read.replaced))
    for name, (indices, rows) in adapter.token_rows.items():
        collected.rows(name, indices, rows)
    changes, notes = collected.changes, list(adapter.config.get("notes", ()))
    if unmerge:
        changes = dict(_invertible(changes, read, called, notes))
    if not changes:
        raise FormatError(f"{called}: holds no change of any weight")
    return Given(called, weight, read.dialect, read.files, changes, tuple(f"{called}: {note}" for note in notes))


def _called(ref: Reference) -> str:
    return "memory" if isinstance(ref, Adapter) else str(ref)


def _read(base: Checkpoint, layout: Layout, ref: Reference, called: str) -> _Read:
    if isinstance(ref, Adapter):
        return _Read(ref, "memory", replaced=tuple(ref.config.get("modules_to_save") or ()))
    path = local_path(str(ref))
    folder = path.parent if path.name == "adapter_model.safetensors" else path
    config = read_config(folder / "adapter_config.json") if folder.is_dir() else {}
    replaced = tuple(config.get("modules_to_save") or ())
    try:
        if config and (config.get("peft_type") != "LORA" or method_of(config)):
            return _variant(base, layout, folder, config, replaced)
        opened = open_adapter(path, layout=layout)
    except LrmergeError as problem:
        raise type(problem)(f"{called} onto {base.ref}: {problem}") from None
    files = tuple(sorted(folder.glob("adapter_*"))) if config else (path,) if path.is_file() else tuple(path.glob("*"))
    return _Read(opened.adapter, opened.dialect, files, replaced=replaced)


def _variant(base: Checkpoint, layout: Layout, folder: Path, config: Mapping[str, Any], replaced) -> _Read:
    """A PEFT adapter whose changes are computed one module at a time, when they are needed."""
    file = folder / "adapter_model.safetensors"
    if not file.is_file():
        raise FormatError(f"{file}: no such file; a PEFT adapter has one")
    variant = read_variant(folder, config, layout, lambda parameter: read_whole(base, parameter))
    made = {}
    for site in variant.sites:
        one = replace(variant, sites=(site,))
        made[f"{site.module}.weight"] = one
        if hasattr(variant.method, "bias_delta_of") and f"{site.module}.bias" in layout.by_name:
            made[f"{site.module}.bias"] = one
    adapter = Adapter({}, variant.saved, variant.token_rows, variant.base, variant.config, variant.metadata)
    files = (file, folder / "adapter_config.json")
    return _Read(adapter, str(config["peft_type"]).lower(), files, made, replaced)


def _delta(variant: Variant, name: str) -> LowRank | Tensor | None:
    """The change of ``name`` under a variant of one module; None where it leaves it alone."""
    return next((delta for changed, delta in variant.deltas() if changed == name), None)


class _Collected:
    """The changes of one adapter, put together from the parts of its file."""

    def __init__(self, base: Checkpoint, layout: Layout, called: str, weight: float):
        self._base, self._layout, self._called, self._weight = base, layout, called, weight
        self.changes: dict[str, Change] = {}

    def parameter(self, name: str, *, fresh: Tensor | None = None) -> Parameter:
        """The base's parameter ``name``, with or without the component that a picture model's adapter puts before it.

        fresh: a tensor that replaces it in full, so that a parameter which the base leaves to chance will do.
        """
        bare = name.partition(".")[2] if name.partition(".")[0] in COMPONENTS else name
        for possible in (name, bare):
            if possible in self._layout.by_name:
                return self._layout.by_name[possible]
            if fresh is not None and possible in self._layout.missing:
                kind = Kind.LINEAR if fresh.ndim == 2 else Kind.VECTOR
                return Parameter(possible, kind, tuple(fresh.shape), ((Block(possible),),))
        raise MismatchError(
            f"{self._called}: changes {name}, which {self._base.ref} does not have; its names look like "
            f"{self._layout.parameters[0].name}: the adapter belongs to another model"
        )

    def put(self, name: str, **parts: Any) -> None:
        """Add ``parts`` to the change of ``name``."""
        own = self.parameter(name, fresh=parts.get("saved")).name
        held = self.changes.get(own, Change(self._weight))
        if held.added is not None and "added" in parts:
            parts["added"] = held.added + parts["added"]
        self.changes[own] = replace(held, **parts)

    def factors(self, name: str, adapted: AdaptedWeight) -> None:
        """Low-rank factors, DoRA's magnitude, and what the bias gets."""
        parameter, delta = self.parameter(name), adapted.delta
        stack = (parameter.matrices,) if delta.A.ndim == 3 or parameter.matrices > 1 else ()
        expected = (*stack, *parameter.matrix_shape)
        if delta.shape != expected:
            raise MismatchError(
                f"{self._called}: its change of {name} has shape {list(delta.shape)}, {self._base.ref} has "
                f"{list(expected)}: the adapter belongs to another model"
            )
        if delta.rank or adapted.magnitude is not None:
            self.put(name, delta=delta, magnitude=adapted.magnitude)
        if adapted.bias is not None:
            bias = f"{parameter.module}.bias"
            if bias not in self._layout.by_name:
                raise MismatchError(
                    f"{self._called}: adds to the bias of {name}, which has none in {self._base.ref}; a lora_bias can "
                    "only be merged into a layer with a bias"
                )
            self.put(bias, added=adapted.bias.float() * delta.scaling)

    def replace(self, name: str, tensor: Tensor, *, alone: bool) -> None:
        """A parameter in full; what is no module of its own is loaded into the base, and so into all ends of a tie."""
        parameter = self.parameter(name, fresh=tensor)
        if tensor.shape != parameter.shape and not self._grows(parameter, tensor):
            raise MismatchError(
                f"{self._called}: {name} has shape {list(tensor.shape)}, {self._base.ref} has {list(parameter.shape)}: "
                "the adapter belongs to another model"
            )
        for end in (parameter.name,) if alone else self._ends(parameter.name):
            self.put(end, saved=tensor)

    def rows(self, name: str, indices: Sequence[int], rows: Tensor) -> None:
        """Rows of a table, trained at every end of its tie."""
        parameter = self.parameter(name)
        fits = len(indices) == len(rows) and rows.shape[1:] == parameter.shape[1:]
        if not fits or any(not 0 <= index < parameter.shape[0] for index in indices):
            raise MismatchError(
                f"{self._called}: token rows {list(rows.shape)} for {len(indices)} indices do not fit {name} of shape "
                f"{list(parameter.shape)} in {self._base.ref}"
            )
        for end in self._ends(parameter.name):
            self.put(end, rows=(list(indices), rows))

    def _grows(self, parameter: Parameter, tensor: Tensor) -> bool:
        """Whether ``parameter`` is a table of tokens or a head over them, and ``tensor`` one of another length."""
        tokens = {p.shape[0] for p in self._layout.parameters if p.kind is Kind.EMBEDDING}
        table = parameter.kind in (Kind.EMBEDDING, Kind.LINEAR) and parameter.shape[0] in tokens
        return table and tensor.shape[1:] == parameter.shape[1:]

    def _ends(self, name: str) -> list[str]:
        if name not in self._layout.by_name:
            return [name]
        return [end.name for end in self._layout.ends(self._layout.ties.get(name, name))]


def _fit(difference: Tensor, parameter: Parameter, called: str) -> Tensor:
    if difference.numel() != math.prod(parameter.shape):
        raise MismatchError(
            f"{called}: its change of {parameter.name} has shape {list(difference.shape)}, the base "
            f"{list(parameter.shape)}: the adapter belongs to another model"
        )
    return difference


def _invertible(changes: dict[str, Change], read: _Read, called: str, notes: list[str]):
    """The changes that can be taken out again; tables that were only saved along with their factors are left.

    Raises:
        UsageError: what the adapter replaced, rescaled or computed from the base is gone once it is merged.
    """
    for name, change in changes.items():
        if change.saved is not None and change.delta is not None and not change.whole(Kind.LINEAR):
            notes.append(f"{name} stands in the adapter in full too and is left as it is; its factors are taken out")
            change = replace(change, saved=None)
        lost = (
            ("replaces it in full", change.saved is not None),
            ("replaces rows of it", change.rows is not None),
            ("is a DoRA, which rescales it", change.magnitude is not None),
            (f"is of type {read.dialect}, which computes its change from the base", _needs_base(change, read, name)),
        )
        for what, true in lost:
            if true:
                raise UsageError(f"--unmerge {called}: cannot be taken out of {name}: the adapter {what}")
        yield name, change


def _needs_base(change: Change, read: _Read, name: str) -> bool:
    if change.made is None:
        return False

    class Asked(Exception):
        """The variant asked for the base's weight."""

    def asked() -> Tensor:
        raise Asked

    variant = read.made[name]
    sites = tuple(replace(site, base_weight=asked, base_bias=asked) for site in variant.sites)
    try:
        _delta(replace(variant, sites=sites), name)
    except Asked:
        return True
    return False
