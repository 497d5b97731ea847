"""Look inside a checkpoint or an adapter: kinds, shapes, ranks, norms, spectra. Reads, writes nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from lrgpu.factored import svd_of_product
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.adapter.open import Opened, is_adapter, is_computed, open_adapter
from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.checkpoint.hub import find
from mergekit_lr.checkpoint.pair import layout_of, read_matrix
from mergekit_lr.checkpoint.parameter import Parameter
from mergekit_lr.errors import FormatError, UsageError


@dataclass(frozen=True)
class Entry:
    """One parameter of a checkpoint under its name in memory."""

    name: str
    kind: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int
    norm: float

    @property
    def parameters(self) -> int:
        """How many numbers it holds."""
        return math.prod(self.shape)


@dataclass(frozen=True)
class Group:
    """Parameters of one kind, shape and dtype. rms_norm: root mean square of their norms."""

    kind: str
    shape: tuple[int, ...]
    dtype: str
    count: int
    parameters: int
    nbytes: int
    rms_norm: float
    example: str


@dataclass(frozen=True)
class CheckpointView:
    """A checkpoint: its parameters one by one and in groups. layout: how their kinds were known."""

    ref: str
    architecture: str | None
    layout: str
    entries: tuple[Entry, ...]
    groups: tuple[Group, ...]
    nbytes: int

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return asdict(self)


@dataclass(frozen=True)
class ModuleView:
    """One adapted weight. singular_values: of its delta, scaling included; of a stack, over all experts."""

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    scaling: float
    norm: float
    singular_values: tuple[float, ...]

    @property
    def effective_rank(self) -> float:
        """exp of the entropy of the squared singular values: how many directions the delta really uses."""
        shares = [s * s / self.norm**2 for s in self.singular_values if s > 0]
        return math.exp(-sum(p * math.log(p) for p in shares)) if shares else 0.0

    def rank_for(self, energy: float) -> int:
        """The least rank that keeps this share of the squared norm."""
        kept, wanted = 0.0, energy * sum(s * s for s in self.singular_values) * (1 - 1e-12)
        for k, s in enumerate(self.singular_values):
            if kept >= wanted:
                return k
            kept += s * s
        return len(self.singular_values)


@dataclass(frozen=True)
class AdapterView:
    """An adapter: its modules with their spectra, and what it saves in full."""

    ref: str
    dialect: str
    base: str | None
    modules: tuple[ModuleView, ...]
    saved: dict[str, tuple[int, ...]]
    notes: tuple[str, ...]

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all modules."""
        return sum(module.rank for module in self.modules)

    @property
    def norm(self) -> float:
        """Frobenius norm of all deltas together."""
        return math.sqrt(sum(module.norm**2 for module in self.modules))

    def largest(self, count: int) -> tuple[ModuleView, ...]:
        """The ``count`` modules with the largest norms, in model order."""
        chosen = set(sorted(range(len(self.modules)), key=lambda i: -self.modules[i].norm)[:count])
        return tuple(module for i, module in enumerate(self.modules) if i in chosen)

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        modules = [asdict(m) | {"effective_rank": m.effective_rank, "rank_99": m.rank_for(0.99)} for m in self.modules]
        return asdict(self) | {"modules": modules, "total_rank": self.total_rank, "norm": self.norm}


def inspect(
    ref: str | Path, *, match: str | None = None, base: str | Path | Checkpoint | None = None
) -> CheckpointView | AdapterView:
    """What is inside ``ref``: a folder, a file or a Hub id of a checkpoint or an adapter.

    Args:
        ref: what to look at. match: only parameters in whose name this regular expression is found. base: of an
            adapter; PEFT's types that are no LoRA need it.

    Raises:
        LrmergeError: it cannot be read.
    """
    try:
        pattern = re.compile(match or "")
    except re.error as error:
        raise UsageError(f"--match {match!r} is no regular expression: {error}") from None
    path = find(str(ref)).path
    if is_adapter(path):
        return _adapter_view(str(ref), _open(path, base), pattern)
    return _checkpoint_view(Checkpoint.open(ref), pattern)


def _open(path: Path, base: str | Path | Checkpoint | None) -> Opened:
    """The adapter as it is; through its base only where nothing less will do, so that a wrong base can be told."""
    computed = path.is_dir() and is_computed(read_config(path / "adapter_config.json"))
    return open_adapter(path, base=Checkpoint.open(base) if computed and base is not None else None)


def _checkpoint_view(checkpoint: Checkpoint, pattern: re.Pattern[str]) -> CheckpointView:
    layout = layout_of(checkpoint)
    entries = [_entry(checkpoint, p) for p in layout.parameters if pattern.search(p.name)]
    if not entries:
        raise FormatError(f"{checkpoint.ref}: no parameter's name matches {pattern.pattern!r}")
    groups: dict[tuple[str, tuple[int, ...], str], list[Entry]] = {}
    for entry in entries:
        groups.setdefault((entry.kind, entry.shape, entry.dtype), []).append(entry)
    architecture = (checkpoint.config.get("architectures") or [checkpoint.config.get("_class_name")])[0]
    return CheckpointView(
        checkpoint.ref,
        architecture,
        layout.source,
        tuple(entries),
        tuple(_group(key, held) for key, held in groups.items()),
        sum(entry.nbytes for entry in entries),
    )


def _entry(checkpoint: Checkpoint, parameter: Parameter) -> Entry:
    squares = 0.0
    for index in range(parameter.matrices):
        matrix = read_matrix(checkpoint, parameter, index)
        # Parts that stay in the cache: the norm costs one pass and no copy of the tensor.
        squares += sum(float(part.double().square().sum()) for part in matrix.reshape(-1).split(1 << 18))
    info = checkpoint.tensors[parameter.blocks[0][0].tensor]
    dtype = str(info.dtype).removeprefix("torch.")
    nbytes = math.prod(parameter.shape) * info.dtype.itemsize
    return Entry(parameter.name, str(parameter.kind), parameter.shape, dtype, nbytes, math.sqrt(squares))


def _group(key: tuple[str, tuple[int, ...], str], entries: Sequence[Entry]) -> Group:
    kind, shape, dtype = key
    rms = math.sqrt(sum(e.norm**2 for e in entries) / len(entries))
    parameters, nbytes = sum(e.parameters for e in entries), sum(e.nbytes for e in entries)
    return Group(kind, shape, dtype, len(entries), parameters, nbytes, rms, entries[0].name)


def _adapter_view(ref: str, opened: Opened, pattern: re.Pattern[str]) -> AdapterView:
    adapter, dialect = opened
    modules = tuple(_module(name, w) for name, w in adapter.weights.items() if pattern.search(name))
    modules += tuple(_dense_module(name, t) for name, t in adapter.added.items() if pattern.search(name))
    saved = {name: tuple(t.shape) for name, t in adapter.saved.items() if pattern.search(name)}
    if not modules and not saved:
        raise FormatError(f"{ref}: no module's name matches {pattern.pattern!r}")
    notes = tuple(str(note) for note in adapter.config.get("notes", ()))
    return AdapterView(ref, dialect, adapter.base, modules, saved, notes)


def _module(name: str, weight: AdaptedWeight) -> ModuleView:
    delta = weight.delta
    values = svd_of_product(delta.B.float(), delta.A.float()).S.double() * abs(delta.scaling)
    if values.dim() > 1:  # a stack: energy by index, summed over the experts
        values = values.square().sum(0).sqrt()
    shape = weight.shape or delta.shape
    norm = float(values.square().sum().sqrt())
    return ModuleView(name, str(weight.kind), shape, delta.rank, delta.scaling, norm, tuple(values.tolist()))


def _dense_module(name: str, difference: Tensor) -> ModuleView:
    """A change that is no product of factors: of full rank, its spectrum not computed."""
    norm = float(torch.linalg.vector_norm(difference.double()))
    full = min(difference.shape[0], difference.numel() // max(difference.shape[0], 1)) if difference.dim() else 1
    return ModuleView(name, "dense", tuple(difference.shape), full, 1.0, norm, ())
