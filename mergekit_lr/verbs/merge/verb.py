"""Merge models or adapters by a recipe: mergekit's YAML unchanged, or ours (``mergekit_lr.recipe``).

Headers first: what happens to every tensor is decided before one is read (``plan_merge``). Then batches of tensors
stream through read, merge and write, straight to their places in the output's shards.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.folder import OutputFile, OutputFolder
from mergekit_lr.checkpoint.shards import MemoryOutput, ShardedOutput
from mergekit_lr.errors import CapacityError, UsageError
from mergekit_lr.graph.journal import Journal, fingerprint
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.recipe.reading import Recipe, read_recipes
from mergekit_lr.report.manifest import state, state_of_files, versions
from mergekit_lr.report.merging import MergeReport
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan, plan_adapters
from mergekit_lr.verbs.merge.adapters import merge_in_memory, merge_to_adapter, merge_to_model
from mergekit_lr.verbs.merge.compute import Merging
from mergekit_lr.verbs.merge.plan import MergePlan, plan_models
from mergekit_lr.verbs.merge.push import check_push, pushed
from mergekit_lr.verbs.merge.result import report_of, write_beside
from mergekit_lr.verbs.merge.similarity import compare_inputs

KEYS = ("model", "base_model", "adapter", "tokenizer_source", "source", "chat_template")  # that name a model
Given = str | Path | Mapping[str, Any] | Recipe


def merge(
    recipe: Given,
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    compare_inputs: bool = False,
    **options: Any,
) -> MergeReport:
    """Merge what a recipe says and write the model, or the adapter.

    Args:
        recipe: a YAML file, of which the last document is the result and those before it are merged first; or one
            document as a mapping or a ``Recipe``.
        out: folder of the result; None keeps it in memory (``report.result`` or ``report.adapter``).
        overwrite: replace an earlier result at ``out``. resume: continue a run that was cut off.
        progress: called with (bytes done, bytes in all, name) as batches finish.
        dtype: of the result, before what the recipe says. shard_size: cut files anew, ``"5GB"``. memory, device,
            threads: see ``resources``. seed: of methods that draw.
        compare_inputs: also say how alike the inputs' changes are and where they interfere (``report.similarity``); a
            pass of its own, which takes longer than an elementwise merge.

    Returns:
        What was done to every tensor by which rule; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: a wrong recipe, bad input or a failed run; nothing is left at ``out``.
    """
    *before, last = read_recipes(recipe)
    check_push(before, last, out)
    if not before:
        report = _merge(last, out, overwrite, resume, progress, compare_inputs, **options)
        return pushed(report, last, progress)
    if out is None:
        raise UsageError("a recipe of several documents is merged on the disk: name OUT")
    parts = Path(out).with_name(f"{Path(out).name}.parts")
    made: dict[str, str] = {}
    for one in before:
        name = str(one.document.name)
        folder = parts / name
        if not (resume and folder.exists()):
            _merge(_with_results(one, made), folder, True, resume, progress, False, **options)
        made[name] = str(folder)
    report = _merge(_with_results(last, made), out, overwrite, resume, progress, compare_inputs, **options)
    shutil.rmtree(parts)
    return pushed(report, last, progress)


def plan_merge(recipe: Given, **options: Any) -> MergePlan | AdapterPlan:
    """The plan of ``merge`` with the same arguments, of the last document; reads headers, and the adapters."""
    return plan_documents(recipe, **options)[-1]


def plan_documents(recipe: Given, **options: Any) -> list[MergePlan | AdapterPlan]:
    """The plans of all documents of a recipe, in order; a model that an earlier one makes is known by its headers.

    Raises:
        UsageError: a document merges an adapter that an earlier one makes, whose ranks are not known before.
    """
    plans: list[MergePlan | AdapterPlan] = []
    made: dict[str, Checkpoint] = {}
    for one in (recipes := read_recipes(recipe)):
        for plan in plans:
            if isinstance(plan, AdapterPlan) and plan.recipe.document.name in _named(one.content):
                raise one.place.error((), f"{plan.recipe.document.name} is an adapter that is not made yet: run merge")
        plans.append(_plan(one, {**options, "given": made} if made else options))
        if isinstance(plans[-1], MergePlan) and one is not recipes[-1]:
            headers = plans[-1].outputs.items()
            tensors = {name: torch.empty(shape, dtype=dtype, device="meta") for name, (dtype, shape) in headers}
            name = str(one.document.name)
            made[name] = Checkpoint.from_tensors(tensors, config=plans[-1].config, ref=name)
    return plans


def _named(content: Any) -> set[str]:
    """Every model and adapter that a document names."""
    if isinstance(content, dict):
        own = {value for key, value in content.items() if key in KEYS and isinstance(value, str)}
        return own.union(*map(_named, content.values()))
    return set().union(*map(_named, content)) if isinstance(content, list) else set()


def _plan(recipe: Recipe, options: dict[str, Any]) -> MergePlan | AdapterPlan:
    return plan_models(recipe, **options) if recipe.document.adapters is None else plan_adapters(recipe, **options)


def _merge(
    recipe: Recipe,
    out: str | Path | None,
    overwrite: bool,
    resume: bool,
    progress: Callable[[Progress], None] | None,
    compare: bool,
    **options: Any,
) -> MergeReport:
    started = time.perf_counter()
    plan = _plan(recipe, options)
    _fetch(plan)
    if out is None:
        with tempfile.TemporaryDirectory(prefix="lrmerge-") as scratch:
            journal = Journal(Path(scratch), "")
            plan = replace(plan, similarity=compare_inputs(plan, progress)) if compare else plan
            if isinstance(plan, AdapterPlan):
                return merge_in_memory(plan, journal, progress, started)
            memory = MemoryOutput(plan.outputs, {})
            _compute(plan, memory, journal, progress)
            return replace(report_of(plan, journal, None, started), result=memory.tensors)
    place = OutputFile if isinstance(plan, AdapterPlan) and plan.to != "peft" else OutputFolder
    with place(out, overwrite=overwrite, resume=resume, inputs=_inputs(plan)) as folder:
        journal = Journal(folder.partial, _fingerprint(plan), resume=resume)
        plan = replace(plan, similarity=compare_inputs(plan, progress)) if compare else plan
        if isinstance(plan, MergePlan):
            report = _merge_models(plan, journal, folder, progress, started)
        elif plan.kind == "model":
            report = merge_to_model(plan, journal, folder, progress, started)
        else:
            report = merge_to_adapter(plan, journal, folder, progress, started)
        journal.close()
    return report


def _merge_models(
    plan: MergePlan, journal: Journal, folder: OutputFolder, progress: Callable[[Progress], None] | None, started: float
) -> MergeReport:
    there = sum(file.stat().st_blocks * 512 for file in folder.partial.iterdir())
    free = shutil.disk_usage(folder.partial).free + there
    if free < plan.written:
        raise CapacityError(
            f"{folder.out}: the result takes {plan.written / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; free "
            "some, or choose another output folder"
        )
    metadata = plan.template.checkpoint.metadata
    shards = ShardedOutput(folder.partial, plan.files, metadata=metadata, resume=journal.resumed > 0)
    _compute(plan, shards, journal, progress)
    shards.finish(index=plan.index)
    return write_beside(plan, report_of(plan, journal, str(folder.out), started), folder.partial, started)


def _compute(
    plan: MergePlan,
    output: ShardedOutput | MemoryOutput,
    journal: Journal,
    progress: Callable[[Progress], None] | None,
) -> None:
    """Run every batch that is not in the journal yet."""
    work = Merging(plan, output, journal)
    left = plan.schedule.without(journal)
    run(left, read=work.read, compute=work.compute, write=work.write, progress=progress)


def _fetch(plan: MergePlan | AdapterPlan) -> None:
    """Download what the plan has seen the headers of, and needs the weights of."""
    if isinstance(plan, MergePlan):
        for source in plan.sources.values():
            source.checkpoint.fetch()
    elif plan.base is not None and plan.reads_base:
        plan.base.fetch()


def _inputs(plan: MergePlan | AdapterPlan) -> list[Path]:
    """Folders that the run reads, which it must never replace."""
    if isinstance(plan, AdapterPlan):
        return list(plan.inputs)
    folders = [source.checkpoint.folder for source in plan.sources.values() if source.checkpoint.folder]
    return folders + [file.parent for source in plan.sources.values() for file in source.files]


def _fingerprint(plan: MergePlan | AdapterPlan) -> str:
    """What must be the same for a journal to be continued: recipe, options, inputs; not where or how fast they run."""
    options = {k: v for k, v in plan.options.items() if k not in ("memory", "device", "threads")}
    if isinstance(plan, AdapterPlan):
        checkpoints, adapters = [plan.base] if plan.base else [], [one.files for one in plan.adapters]
        earlier = [step.earlier for step in plan.steps]
    else:
        checkpoints = [source.checkpoint for source in plan.sources.values()]
        adapters = [source.files for source in plan.sources.values() if source.applied is not None]
        earlier = [job.earlier for job in plan.jobs]
    states = [*map(state, checkpoints), *map(state_of_files, adapters)]
    return fingerprint(plan.recipe.content, options, states, earlier, versions())


def _with_results(recipe: Recipe, made: Mapping[str, str]) -> Recipe:
    """``recipe`` with the folder of a result wherever it names an earlier document."""

    def changed(value: Any) -> Any:
        if isinstance(value, dict):
            return {k: made.get(v, v) if k in KEYS and isinstance(v, str) else changed(v) for k, v in value.items()}
        return [changed(entry) for entry in value] if isinstance(value, list) else value

    return recipe.changed(changed(recipe.content))
