"""Merge adapters in their factors, into one adapter or into a model; what is finished lies in the journal."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from lrgpu.random import stream
from lrgpu.truncated import truncated_svd
from torch import Tensor

from mergekit_lr.adapter import peft
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.folder import OutputFolder
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.shards import ShardedOutput
from mergekit_lr.errors import FormatError, LrmergeError, UsageError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.methods.delta import squared_norm
from mergekit_lr.methods.merge_tensors import merge_tensors
from mergekit_lr.report.manifest import manifest, write_manifest
from mergekit_lr.report.merging import MergedTensor, MergeReport
from mergekit_lr.report.merging_card import write_merging_card
from mergekit_lr.verbs.apply.plan import DTYPES, ApplyPlan, plan_apply
from mergekit_lr.verbs.apply.result import report_of as application_of
from mergekit_lr.verbs.apply.result import write_beside as write_model_beside
from mergekit_lr.verbs.apply.verb import compute as apply_to
from mergekit_lr.verbs.compress import compress
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan, Step
from mergekit_lr.verbs.merge.result import recipe_text


class Done(NamedTuple):
    """A merged module: factors A and B, or the dense change; and figures that JSON can hold."""

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


def merge_to_adapter(
    plan: AdapterPlan,
    journal: Journal,
    folder: OutputFolder | None,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> MergeReport:
    """Merge into an adapter and write it into ``folder``, or keep it in memory; a model only on the disk."""
    if plan.kind == "model":
        raise UsageError("a model that adapters are merged into is written to the disk: name OUT")
    _compute(plan, journal, progress)
    adapter, tensors = _assembled(plan, journal)
    report = _report(plan, tensors, str(folder.out) if folder else None, started)
    if folder is None:
        return replace(report, adapter=_in_memory(adapter))
    dtype = DTYPES[plan.dtype] if plan.dtype else _own_dtype(plan)
    task = next((one.adapter.config.get("task_type") for one in plan.adapters), None)
    peft.save(adapter, folder.partial, dtype=dtype, layout=plan.layout, task_type=task)
    size = (folder.partial / "adapter_model.safetensors").stat().st_size
    report = replace(report, files={"adapter_model.safetensors": size}, written_bytes=size)
    return _finished(plan, report, folder, started)


def merge_to_model(
    plan: AdapterPlan,
    journal: Journal,
    folder: OutputFolder,
    progress: Callable[[Progress], None] | None,
    started: float,
) -> MergeReport:
    """Merge the adapters, then bake the result into the base and write the model."""
    _compute(plan, journal, progress)
    adapter, tensors = _assembled(plan, journal)
    onto = _application(plan, adapter)
    metadata = onto.base.metadata
    shards = ShardedOutput(folder.partial, onto.files, metadata=metadata, resume=journal.resumed > 0)
    apply_to(onto, shards, journal, progress)
    shards.finish(index=onto.index)
    applied = write_model_beside(onto, application_of(onto, journal, str(folder.out), started), folder.partial, started)
    report = _report(plan, tensors, str(folder.out), started)
    report = replace(
        report,
        kind="model",
        files=applied.files,
        config=applied.config,
        notes=(*report.notes, *applied.notes),
        read_bytes=report.read_bytes + applied.read_bytes,
        written_bytes=applied.written_bytes,
    )
    return _finished(plan, report, folder, started)


def _application(plan: AdapterPlan, adapter: Adapter) -> ApplyPlan:
    assert plan.base is not None
    keys = ("dtype", "shard_size", "memory", "device", "threads")
    return plan_apply(plan.base, [(adapter, 1.0)], **{key: plan.options[key] for key in keys})


def _finished(plan: AdapterPlan, report: MergeReport, folder: OutputFolder, started: float) -> MergeReport:
    report = replace(report, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)
    write_merging_card(report, recipe_text(plan.recipe.content), folder.partial)
    given = [
        {"ref": one.ref, "files": [{"file": file.name, "bytes": file.stat().st_size} for file in one.files]}
        for one in plan.adapters
    ]
    inputs = {"base": plan.base} if plan.base is not None else {}
    content = report.to_json() | {"recipe": plan.recipe.content, "adapters": given}
    write_manifest(folder.partial, manifest("merge", inputs, plan.options, content))
    return report


def _compute(plan: AdapterPlan, journal: Journal, progress: Callable[[Progress], None] | None) -> None:
    """Merge every module that is not in the journal yet."""

    def keep(batch: Batch, results: list[Done]) -> None:
        for node, done in zip(batch.nodes, results, strict=True):
            journal.add(node.name, done.tensors, done.figures)

    def merged(batch: Batch, _: None) -> list[Done]:
        return [_module(plan, node.work) for node in batch.nodes]

    run(plan.schedule.without(journal), read=lambda batch: None, compute=merged, write=keep, progress=progress)


def _module(plan: AdapterPlan, step: Step) -> Done:
    """One merged module, truncated where the recipe names a rank."""
    doc, device = plan.recipe.document, plan.resources.device
    try:
        merged = merge_tensors(
            plan.recipe.method.name,
            [delta.to(device=device) for delta in step.deltas],
            space=doc.space,
            seed=plan.seed,
            name_of_tensor=step.name,
            **step.arguments,
        )
    except LrmergeError as error:
        raise type(error)(f"{step.name}: {error}") from None
    norm = float(squared_norm(merged).sum())
    if not math.isfinite(norm):
        raise FormatError(f"{step.name}: the merged change holds NaN or Inf; an adapter is damaged")
    if isinstance(merged, Tensor) and plan.kind == "model" and not _truncated(plan):
        return Done({"dense": _own_layout(merged, step).cpu()}, {"norm": norm, "lost": 0.0})
    factors, lost = _factors(merged, doc.output.rank, stream(plan.seed, step.name, "truncation"))
    folded = factors.folded()
    return Done({"A": folded.A.cpu(), "B": folded.B.cpu()}, {"norm": norm, "lost": lost})


def _truncated(plan: AdapterPlan) -> bool:
    return any(getattr(plan.recipe.document.output, key) is not None for key in ("rank", "energy", "size"))


def _factors(merged: Tensor | LowRank, rank: int | None, seed: int) -> tuple[LowRank, float]:
    """Factors of at most ``rank``, and the squared norm of what was cut off."""
    if isinstance(merged, LowRank):
        if rank is None or rank >= merged.rank:
            return merged, 0.0
        cut = merged.truncate(rank)
        return cut.delta, float((cut.residual**2).sum())
    side = min(merged.shape[-2:])
    if rank is None or rank >= side:
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    else:
        found = truncated_svd(merged, rank, seeds=seed)
        U, S, Vh = found.U, found.S, found.Vh
    root = S.clamp_min(0).sqrt()
    factors = LowRank(root[..., :, None] * Vh, U * root[..., None, :])
    kept = float((S.double() ** 2).sum())
    return factors, max(float(squared_norm(merged).sum()) - kept, 0.0)


def _own_layout(delta: Tensor, step: Step) -> Tensor:
    """A dense change (..., d_out, d_in) as the weight itself is laid out."""
    own = delta.mT if step.kind.turned else delta
    return own.reshape(step.shape).contiguous() if step.kind is Kind.CONVOLUTION and step.shape else own.contiguous()


def _assembled(plan: AdapterPlan, journal: Journal) -> tuple[Adapter, tuple[MergedTensor, ...]]:
    """The merged adapter, mapped from the journal, and the figures of its modules; budgets are spent here."""
    output = plan.recipe.document.output
    base = (
        plan.base.ref
        if plan.base is not None
        else next((o.adapter.base for o in plan.adapters if o.adapter.base), None)
    )
    config = {k: v for k, v in plan.adapters[0].adapter.config.items() if k in ("task_type", "revision")}
    weights, added = {}, {}
    for step in plan.steps:
        if plan.dense and plan.kind == "model" and not _truncated(plan):
            added[step.name] = journal.tensor(step.name, "dense")
        else:
            factors = LowRank(journal.tensor(step.name, "A"), journal.tensor(step.name, "B"))
            weights[step.name] = AdaptedWeight(step.kind, factors, step.shape)
    adapter = Adapter(weights, added=added, base=base, config=config)
    lost = {step.name: journal.figures[step.name]["lost"] for step in plan.steps}
    if output.energy is not None or output.size is not None:
        limits = {"energy": output.energy} if output.energy is not None else {"size": output.size}
        keys = ("memory", "device", "threads")
        dtype = plan.dtype or str(_own_dtype(plan)).removeprefix("torch.")
        squeezed = compress(adapter, dtype=dtype, **limits, **{key: plan.options[key] for key in keys})
        assert squeezed.adapter is not None
        adapter = replace(adapter, weights=squeezed.adapter.weights)
        lost |= {module.name: lost[module.name] + module.squared_error for module in squeezed.modules}
    figures = []
    for name, state in plan.states.items():
        known = next((step for step in plan.steps if step.name == name), None)
        shape = known.deltas[0].shape if known is not None else ()
        norm = journal.figures[name]["norm"] if known is not None else 0.0
        rank = adapter.weights[name].delta.rank if name in adapter.weights else None
        figures.append(MergedTensor(name, shape, state, plan.rules[name], norm, lost.get(name, 0.0), rank))
    return adapter, tuple(figures)


def _own_dtype(plan: AdapterPlan) -> torch.dtype:
    """The dtype of the first adapter's factors."""
    return next(iter(plan.adapters[0].adapter.weights.values())).delta.A.dtype


def _in_memory(adapter: Adapter) -> Adapter:
    """The adapter without a tie to the journal's file."""
    weights = {
        name: replace(weight, delta=replace(weight.delta, A=weight.delta.A.clone(), B=weight.delta.B.clone()))
        for name, weight in adapter.weights.items()
    }
    return replace(adapter, weights=weights)


def _report(plan: AdapterPlan, tensors: tuple[MergedTensor, ...], out: str | None, started: float) -> MergeReport:
    return MergeReport(
        out=out,
        kind="adapter",
        method=plan.recipe.method.name,
        space=plan.recipe.document.space,
        base=plan.base.ref if plan.base is not None else plan.adapters[0].adapter.base,
        models=tuple(one.ref for one in plan.adapters),
        tensors=tensors,
        states=dict(Counter(plan.states.values())),
        files={},
        config={},
        notes=plan.notes,
        read_bytes=plan.schedule.cost.read,
        written_bytes=0,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - started,
    )
