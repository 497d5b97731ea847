"""Compress a LoRA to lower ranks after training, in its factors (LoRA-Squeeze, arXiv 2602.10993)."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from lrgpu.rank import allocate
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.adapter.experts import padded
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.target import fit
from mergekit_lr.errors import FormatError, UsageError
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.report.compression import AdapterReport, ModuleChange, kept_tensors
from mergekit_lr.verbs.adapter_destination import Destination
from mergekit_lr.verbs.compress.compute import Squeezed, compute, read
from mergekit_lr.verbs.compress.plan import CompressPlan, Step, plan_compress

DORA = (
    "DoRA: magnitudes stay as they are, so every row keeps its length exactly; the error given is that of B A inside "
    "the rescaling"
)


def compress(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> AdapterReport:
    """Compress a LoRA to lower ranks: the best approximation of every module, its error known exactly.

    A module whose rank is not above the one asked for stays as it is, byte for byte. What is no factors (modules saved
    in full, token rows, biases, DoRA magnitudes) stays as well.

    Args:
        adapter: a PEFT folder, a file of any dialect, a Hub id, or an adapter in memory.
        out: the result: a folder, or a file for the dialects of image tools; None keeps it in memory.
        overwrite: replace an earlier result at ``out``. progress: called with (bytes done, bytes in all, name).
        rank: of every module. energy: keep at least this share of each delta's squared norm. error: keep each relative
            Frobenius error at or below this; 0 finds the ranks that are really there.
        size, max_params: one budget for the whole adapter, ``"50MB"`` or a count of numbers, spent where it keeps most.
        max_rank, multiple_of: bounds on any rank so found; ``max_rank`` alone takes no more than is really there.
        rank_pattern: regular expression to a rank of its own.
        include, exclude: regular expressions over names; the other modules stay as they are.
        to: dialect of the result, by default that of the source. component: see ``convert``.
        target: make it fit ``vllm``, ``sglang``, ``tensorrt-llm`` or ``peft``; alone, without any compression.
        base: the base model, where the adapter's names need it.
        dtype: of the compressed factors, by default their own. memory, device, threads: see ``resources``.

    Returns:
        What was done and lost, per module and in total; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: bad input or a failed run; nothing is left at ``out``.
    """
    plan = plan_compress(adapter, **options)
    if out is None:
        result, report = assemble(plan, squeeze(plan, progress))
        return replace(report, adapter=result)
    with Destination(out, plan.to, overwrite=overwrite, inputs=plan.source.inputs) as destination:
        result, report = assemble(plan, squeeze(plan, progress))
        return destination.write(result, report, plan.source, plan.base, options=plan.options, started=plan.started)


def squeeze(plan: CompressPlan, progress: Callable[[Progress], None] | None = None) -> dict[str, Squeezed]:
    """Run every batch of the plan; the results by node name."""
    done: dict[str, Squeezed] = {}

    def keep(batch: Batch, results: list[Squeezed]) -> None:
        done.update(zip((node.name for node in batch.nodes), results, strict=True))

    work = partial(compute, device=plan.resources.device)
    run(plan.schedule, read=read, compute=work, write=keep, progress=progress)
    return done


def assemble(plan: CompressPlan, done: dict[str, Squeezed]) -> tuple[Adapter, AdapterReport]:
    """The compressed adapter under the names of its new dialect, and what it lost."""
    ranks = final_ranks(plan, done)
    source = plan.source.adapter
    squeezed = {step.name: _weight(step, done, ranks[step.name]) for step in plan.steps}
    weights = {name: weight for name, weight in squeezed.items() if weight is not None}
    if not weights and not source.saved:
        raise UsageError("nothing of the adapter is left: the budget does not buy a single direction; give more")
    notes = [str(note) for note in source.config.get("notes", ())]
    if any(weight.magnitude is not None for weight in weights.values()):
        notes.append(DORA)
    # All computed factors have scaling 1, so what the config said of scales is settled.
    adapter = replace(source, weights=weights)
    renamed = named_for(adapter, plan.source.dialect, plan.to, plan.component)
    adapter = renamed.adapter
    if plan.target is not None:
        layout = plan.base.layout if plan.base is not None else None
        adapter, more = fit(adapter, plan.target, layout)
        notes += more
    modules = tuple(_change(step, done, ranks[step.name]) for step in plan.steps)
    dtypes = {step.dtype for step in plan.steps if step.rule is not None} or {torch.float32}
    report = AdapterReport(
        verb="compress",
        out=None,
        source=plan.source.ref,
        dialect=plan.source.dialect,
        to=plan.to,
        target=plan.target,
        base=source.base,
        dtype=str(max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)).removeprefix("torch."),
        modules=modules,
        others=tuple(kept_tensors(source, left_out=renamed.left_out)),
        notes=tuple(notes),
        bytes_before=plan.source.nbytes,
        bytes_after=sum(w.delta.A.nbytes + w.delta.B.nbytes for w in adapter.weights.values()),
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - plan.started,
    )
    return adapter, report


def final_ranks(plan: CompressPlan, done: dict[str, Squeezed]) -> dict[str, int]:
    """The rank of every module: its own where it stays, what its rule chose, or its share of the budget.

    All experts of a stack get the rank of the one that needs most, as their factors share one tensor.
    """
    ranks = {step.name: step.weight.delta.rank for step in plan.steps}
    chosen = [step for step in plan.steps if step.rule is not None]
    for step in chosen:
        found = max(len(done[node.name].singular_values) for node in step.nodes)
        ranks[step.name] = max(found, step.needed)
    shared = [step for step in chosen if step.rule is not None and step.rule.count is None]
    if plan.budget is not None:
        spectra = [_spectrum(step, done) for step in shared]
        limits = {"max_rank": plan.max_rank, "multiple_of": plan.multiple_of}
        bought = allocate(spectra, [plan.cost(step) for step in shared], plan.budget, **limits)
        ranks |= {step.name: max(rank, step.needed) for step, rank in zip(shared, bought, strict=True)}
    return ranks


def _spectrum(step: Step, done: dict[str, Squeezed]) -> list[float]:
    """Singular values of a module; of a stack, the root of the summed squares over its experts."""
    values = [done[node.name].singular_values for node in step.nodes]
    if len(values) == 1:
        return values[0]
    return [sum(v[i] ** 2 for v in values if i < len(v)) ** 0.5 for i in range(max(map(len, values)))]


def _weight(step: Step, done: dict[str, Squeezed], rank: int) -> AdaptedWeight | None:
    """The module at its new rank; None where nothing is left of it."""
    if _stays(step, rank):
        return replace(step.weight, delta=step.weight.delta.to(step.dtype))
    if rank == 0:
        return None
    pairs = [_cut(done[node.name], rank) for node in step.nodes]
    A, B = pairs[0] if step.weight.delta.A.ndim == 2 else (torch.stack(parts) for parts in zip(*pairs, strict=True))
    # The layer's bias is scaled as the factors were.
    bias = None if step.weight.bias is None else step.weight.bias * step.weight.delta.scaling
    return replace(step.weight, delta=LowRank(A, B), bias=bias)


def _stays(step: Step, rank: int) -> bool:
    """Whether a module stays as it is: nothing was asked of it, or it needs all the rank that it has."""
    return step.rule is None or 0 < step.weight.delta.rank <= rank


def _cut(squeezed: Squeezed, rank: int) -> tuple[Tensor, Tensor]:
    if squeezed.A is None or squeezed.B is None:
        raise FormatError("a module that was only measured has no factors")
    return padded(squeezed.A[:rank], rank, 0), padded(squeezed.B[:, :rank], rank, 1)


def _change(step: Step, done: dict[str, Squeezed], rank: int) -> ModuleChange:
    parts = [done[node.name] for node in step.nodes]
    norm = sum(part.squared_norm for part in parts)
    held = sum(sum(value * value for value in part.singular_values[:rank]) for part in parts)
    before = step.weight.delta.rank
    if _stays(step, rank):
        state, reason = "kept", step.reason or f"needs all of its rank {before}"
        held = norm
    else:
        state = "compressed" if rank else "dropped"
        reason = "" if rank else "its change is zero" if norm == 0 else "the budget"
    return ModuleChange(
        name=step.name,
        kind=str(step.weight.kind),
        shape=step.weight.shape or tuple(step.weight.delta.shape),
        state=state,
        rank_before=before,
        rank=rank,
        stored_before=before * step.per_rank,
        stored=rank * step.per_rank,
        squared_norm=norm,
        squared_error=max(norm - held, 0.0),
        singular_values=tuple(_spectrum(step, done)),
        reason=reason,
    )
