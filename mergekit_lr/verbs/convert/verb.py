"""Convert an adapter between dialects, types and layouts of experts: lossless where the formats allow it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from lrgpu.truncated import truncated_svd_by_rule
from torch import Tensor

from mergekit_lr.adapter import experts
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.errors import FormatError
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.graph.run import Progress
from mergekit_lr.report.compression import AdapterReport, ModuleChange, kept_tensors
from mergekit_lr.verbs.adapter_destination import Destination
from mergekit_lr.verbs.convert.plan import HOLDS_ADDED, ConvertPlan, as_kind, plan_convert
from mergekit_lr.verbs.extract.compute import seed_of


def convert(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    to: str,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> AdapterReport:
    """Convert an adapter to another dialect.

    Args:
        adapter: a PEFT folder of any type, a file of any dialect, a Hub id, or an adapter in memory.
        out: the result: a folder for ``peft``, else a file; None keeps it in memory.
        to: ``peft``, ``kohya``, ``lycoris``, ``diffusers`` or ``comfy``.
        overwrite: replace an earlier result at ``out``. progress: called with (bytes done, bytes in all, name).
        experts: ``"fused"`` or ``"per-expert"``: on stacks, or on single experts as servers want them.
        dora: ``"keep"`` magnitudes, or ``"fold"`` what they do into factors; that needs ``base``.
        base: the base model, for the names of its modules, their kinds, and where its weights are needed.
        component: which part of a pipeline a PEFT folder is of: ``unet``, ``transformer``, ``text_encoder`` ...
        rank, energy, error, max_rank, multiple_of: of changes that are not of low rank, as in ``extract``.
        dtype: of all factors; by default they stay as they are. device, seed: for truncated SVDs.

    Returns:
        What was done and lost, per module and in total; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: bad input, or what the dialect cannot hold; nothing is left at ``out``.
    """
    plan = plan_convert(adapter, to=to, **options)
    if out is None:
        done = transform(plan, progress)
        return replace(_report(plan, done), adapter=done.adapter)
    with Destination(out, to, overwrite=overwrite, inputs=plan.source.inputs) as destination:
        done = transform(plan, progress)
        return destination.write(
            done.adapter, _report(plan, done), plan.source, plan.base, options=plan.options, started=plan.started
        )


class Transformed(NamedTuple):
    """The adapter as it will be written, what became of each module, and names of other components left out."""

    adapter: Adapter
    changes: tuple[ModuleChange, ...]
    left_out: tuple[str, ...]


def transform(plan: ConvertPlan, progress: Callable[[Progress], None] | None = None) -> Transformed:
    """Factors for everything that needs them, one module at a time; then experts, names and dtype."""
    work = _Work(plan)
    total, done = max(plan.source.nbytes, 1), 0
    for name in work.modules():
        done += total // max(len(plan.steps), 1)
        if progress:
            progress(Progress(done, total, name))
    adapter = replace(
        plan.source.adapter,
        weights=work.weights,
        saved={**plan.source.adapter.saved, **work.saved},
        added=dict(plan.source.adapter.added) if plan.to in HOLDS_ADDED else {},
        base=plan.source.adapter.base or (plan.base.checkpoint.ref if plan.base else None),
    )
    if plan.experts is not None:
        layout = plan.base.layout if plan.base else None
        adapter = (experts.split if plan.experts == "per-expert" else experts.fuse)(adapter, layout)
        state = "split" if plan.experts == "per-expert" else "fused"
        work.changes = [c if c.name in adapter.weights or not c.rank else replace(c, state=state) for c in work.changes]
    if plan.dtype is not None:
        weights = {name: replace(w, delta=w.delta.to(plan.dtype)) for name, w in adapter.weights.items()}
        adapter = replace(adapter, weights=weights)
    renamed = named_for(adapter, plan.source.dialect, plan.to, plan.component)
    changes = tuple(
        replace(c, state="left out", rank=0, stored=0) if c.name in renamed.left_out else c for c in work.changes
    )
    return Transformed(renamed.adapter, changes, renamed.left_out)


def _report(plan: ConvertPlan, done: Transformed) -> AdapterReport:
    source = plan.source.adapter
    return AdapterReport(
        verb="convert",
        out=None,
        source=plan.source.ref,
        dialect=plan.source.dialect,
        to=plan.to,
        target=None,
        base=done.adapter.base,
        dtype=str(plan.stored).removeprefix("torch."),
        modules=done.changes,
        others=tuple(kept_tensors(source, done.left_out)),
        notes=tuple(str(note) for note in source.config.get("notes", ())),
        bytes_before=plan.source.nbytes,
        bytes_after=sum(w.delta.A.nbytes + w.delta.B.nbytes for w in done.adapter.weights.values()),
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - plan.started,
    )


@dataclass
class _Work:
    """The result as it grows, module by module; no more than one change in full is in memory."""

    plan: ConvertPlan
    weights: dict[str, AdaptedWeight] = field(default_factory=dict)
    saved: dict[str, Tensor] = field(default_factory=dict)
    changes: list[ModuleChange] = field(default_factory=list)

    def modules(self) -> Iterator[str]:
        """Do the work; the name of every module when it is done."""
        source = self.plan.source
        for name, delta in source.variant.deltas() if source.variant else ():
            self._computed(name, delta)
            yield name
        for name, weight in source.adapter.weights.items():
            _refuse_nan(name, weight)
            if self.plan.fold and weight.magnitude is not None:
                self._fold(name, weight, weight.magnitude)
            else:
                self._keep(name, weight, "kept")
            yield name
        for name, difference in source.adapter.added.items():
            if self.plan.to not in HOLDS_ADDED:
                self._difference(name, difference)
            yield name

    def _computed(self, name: str, delta: LowRank | Tensor) -> None:
        """A change that one of PEFT's other types makes."""
        parameter = self.plan.parameter(name)
        if isinstance(delta, LowRank):
            weight = AdaptedWeight(parameter.kind, delta, parameter.shape)
            self._keep(name, weight, "decomposed", "exactly of low rank")
        elif delta.ndim == 1:
            self._add(name, delta)
        else:
            self._decompose(name, delta, AdaptedWeight(parameter.kind, _nothing(delta), parameter.shape), "decomposed")

    def _fold(self, name: str, weight: AdaptedWeight, magnitude: Tensor) -> None:
        """What a DoRA makes of the base's weight, as factors."""
        parameter, matrix = self.plan.weight(name)
        change = rescaled(as_matrix(matrix, parameter.kind), weight.delta, magnitude)
        bias = None if weight.bias is None else weight.bias * weight.delta.scaling
        weight = replace(weight, magnitude=None, bias=bias)
        if isinstance(change, LowRank):
            self._keep(name, replace(weight, delta=change.folded()), "folded", "its lengths are the base's")
        else:
            self._decompose(name, change, weight, "folded")

    def _difference(self, name: str, difference: Tensor) -> None:
        if difference.ndim == 1:
            self._add(name, difference)
            return
        kind = as_kind(difference, self.plan.parameter(name) if self.plan.base else None)
        matrix = as_matrix(difference.float(), kind)
        self._decompose(name, matrix, AdaptedWeight(kind, _nothing(matrix), tuple(difference.shape)), "decomposed")

    def _add(self, name: str, difference: Tensor) -> None:
        """A vector's difference: PEFT holds the sum with the base's own."""
        _, vector = self.plan.weight(name)
        self.saved[name] = (vector.float() + difference.float()).to(vector.dtype)

    def _keep(self, name: str, weight: AdaptedWeight, state: str, reason: str = "") -> None:
        self.weights[name] = weight
        delta = weight.delta
        stored = delta.A.numel() + delta.B.numel()
        norm = float(delta.norm().square().sum())
        shape = weight.shape or tuple(delta.shape)
        change = ModuleChange(name, str(weight.kind), shape, state, delta.rank, delta.rank, stored, stored, norm)
        self.changes.append(replace(change, reason=reason))

    def _decompose(self, name: str, matrix: Tensor, weight: AdaptedWeight, state: str) -> None:
        """The truncated SVD of ``matrix`` (d_out, d_in) in the place of what ``weight`` had."""
        plan, before = self.plan, weight.delta
        matrix = matrix.to(plan.device)
        norm = float(matrix.double().square().sum())
        rank, error = 0, 0.0
        if norm > 0:
            svd = truncated_svd_by_rule(matrix, plan.rule, squared_norm=norm, seeds=seed_of(plan.seed, name))
            root, rank = svd.S.sqrt(), len(svd.S)
            A, B = (root[:, None] * svd.Vh).to(plan.stored).cpu(), (svd.U * root).to(plan.stored).cpu()
            # From the difference itself: norms subtracted would hide all errors below 1e-4.
            error = float(torch.addmm(matrix, svd.U * svd.S, svd.Vh, alpha=-1).double().square().sum())
        if rank:
            self.weights[name] = replace(weight, delta=LowRank(A, B))
        self.changes.append(
            ModuleChange(
                name=name,
                kind=str(weight.kind),
                shape=weight.shape or tuple(matrix.shape),
                state=state if rank else "dropped",
                rank_before=before.rank,
                rank=rank,
                stored_before=before.A.numel() + before.B.numel(),
                stored=rank * sum(matrix.shape),
                squared_norm=norm,
                squared_error=error,
                reason="" if rank else "its change is zero",
            )
        )


def _nothing(matrix: Tensor) -> LowRank:
    """Factors of rank 0 in the shape of ``matrix``: what a change in full had of them before."""
    return LowRank(torch.empty(0, matrix.shape[1]), torch.empty(matrix.shape[0], 0))


def _refuse_nan(name: str, weight: AdaptedWeight) -> None:
    for which, factor in (("A", weight.delta.A), ("B", weight.delta.B)):
        if not bool(factor.sum(dtype=torch.float32).isfinite()):
            raise FormatError(f"{name}: factor {which} holds NaN or Inf; the adapter is damaged")
