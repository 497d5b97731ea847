"""Merge adapters, into one adapter or into a model; what is finished lies in the journal."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace

import torch

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.checkpoint.folder import OutputFile, OutputFolder
from mergekit_lr.checkpoint.shards import ShardedOutput
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.report.card import notes_of
from mergekit_lr.report.manifest import manifest, write_manifest
from mergekit_lr.report.merging import MergeReport
from mergekit_lr.report.merging_card import adapters_merged, write_merging_card
from mergekit_lr.verbs.apply.plan import DTYPES, ApplyPlan, plan_apply
from mergekit_lr.verbs.apply.result import report_of as application_of
from mergekit_lr.verbs.apply.result import write_beside as write_model_beside
from mergekit_lr.verbs.apply.verb import compute as apply_to
from mergekit_lr.verbs.merge.adapter_compute import AdapterMerging
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan
from mergekit_lr.verbs.merge.adapter_result import assembled, named, report_of, write

Advance = Callable[[Progress], None] | None


def merge_in_memory(plan: AdapterPlan, journal: Journal, progress: Advance, started: float) -> MergeReport:
    """Merge into an adapter in memory.

    Raises:
        UsageError: the recipe asks for a model, which is written to the disk only.
    """
    if plan.kind == "model":
        raise UsageError("a model that adapters are merged into is written to the disk: name OUT")
    _compute(plan, journal, progress)
    adapter, tensors = assembled(plan, journal)
    return replace(report_of(plan, tensors, None, started), adapter=_untied(plan, named(plan, adapter)))


def merge_to_adapter(
    plan: AdapterPlan, journal: Journal, folder: OutputFolder, progress: Advance, started: float
) -> MergeReport:
    """Merge into an adapter and write it into ``folder``."""
    if plan.to == "peft" and folder.out.suffix == ".safetensors":
        raise UsageError(f"{folder.out}: a PEFT adapter is a folder; leave .safetensors off --out")
    output = plan.recipe.document.output
    final = output.energy is None and output.size is None
    _compute(plan, journal, progress, plan.stored_dtype if final else None)
    adapter, tensors = assembled(plan, journal)
    report = report_of(plan, tensors, str(folder.out), started)
    file, notes = write(plan, named(plan, adapter), folder.partial)
    size = file.stat().st_size
    name = folder.out.name if isinstance(folder, OutputFile) else file.name
    report = replace(report, files={name: size}, written_bytes=size, notes=(*report.notes, *notes))
    return _finished(plan, report, folder, started)


def merge_to_model(
    plan: AdapterPlan, journal: Journal, folder: OutputFolder, progress: Advance, started: float
) -> MergeReport:
    """Merge the adapters, then bake the result into the base and write the model."""
    _compute(plan, journal, progress)
    adapter, tensors = assembled(plan, journal)
    onto = _application(plan, adapter)
    metadata = onto.base.metadata
    shards = ShardedOutput(folder.partial, onto.files, metadata=metadata, resume=journal.resumed > 0)
    apply_to(onto, shards, journal, progress)
    shards.finish(index=onto.index)
    applied = write_model_beside(onto, application_of(onto, journal, str(folder.out), started), folder.partial, started)
    report = report_of(plan, tensors, str(folder.out), started)
    report = replace(
        report,
        kind="model",
        format=None,
        files=applied.files,
        config=applied.config,
        notes=(*report.notes, *applied.notes),
        read_bytes=report.read_bytes + applied.read_bytes,
        written_bytes=applied.written_bytes,
    )
    return _finished(plan, report, folder, started)


def _compute(plan: AdapterPlan, journal: Journal, progress: Advance, dtype: torch.dtype | None = None) -> None:
    """Merge everything that is not in the journal yet; ``dtype``: of factors in the journal."""
    work = AdapterMerging(plan, journal, dtype)
    run(plan.schedule.without(journal), read=work.read, compute=work.compute, write=work.write, progress=progress)


def _application(plan: AdapterPlan, adapter: Adapter) -> ApplyPlan:
    assert plan.base is not None
    keys = ("dtype", "shard_size", "memory", "device", "threads")
    return plan_apply(plan.base, [(adapter, 1.0)], **{key: plan.options[key] for key in keys})


def _finished(plan: AdapterPlan, report: MergeReport, folder: OutputFolder, started: float) -> MergeReport:
    report = replace(report, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)
    origins = adapters_merged(plan.adapters, plan.base)
    report = replace(report, notes=(*report.notes, *notes_of(origins)))
    if not isinstance(folder, OutputFile):  # one file has no card beside it
        write_merging_card(report, plan.recipe.content, origins, folder.partial, plan.options)
    given = [
        {"ref": one.ref, "files": [{"file": file.name, "bytes": file.stat().st_size} for file in one.files]}
        for one in plan.adapters
    ]
    inputs = {"base": plan.base} if plan.base is not None else {}
    content = report.to_json() | {"recipe": plan.recipe.content, "adapters": given}
    write_manifest(folder.partial, manifest("merge", inputs, plan.options, content))
    return report


def _untied(plan: AdapterPlan, adapter: Adapter) -> Adapter:
    """The adapter in the dtype that was asked for, without a tie to the journal's file."""

    def own(weight: AdaptedWeight) -> AdaptedWeight:
        delta = weight.delta.to(DTYPES[plan.dtype] if plan.dtype else None)
        beside = {key: getattr(weight, key) for key in ("bias", "magnitude")}
        copies = {key: tensor.clone() for key, tensor in beside.items() if tensor is not None}
        return replace(weight, delta=replace(delta, A=delta.A.clone(), B=delta.B.clone()), **copies)

    return replace(
        adapter,
        weights={name: own(weight) for name, weight in adapter.weights.items()},
        saved={name: tensor.clone() for name, tensor in adapter.saved.items()},
        added={name: tensor.clone() for name, tensor in adapter.added.items()},
        token_rows={name: (rows, tensor.clone()) for name, (rows, tensor) in adapter.token_rows.items()},
    )
