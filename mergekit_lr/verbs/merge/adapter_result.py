"""The merged adapter from its finished parts, what was lost on the way, and its file in any dialect."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

import torch

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.adapter.experts import padded
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.target import SERVERS, fit, rewrite_config
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.checkpoint.folder import OutputFile
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.report.merging import MergedTensor, MergeReport
from mergekit_lr.verbs.adapter_destination import WRITERS, save_peft
from mergekit_lr.verbs.adapter_source import PEFT_FILE
from mergekit_lr.verbs.compress import compress
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan
from mergekit_lr.verbs.merge.adapter_sources import KEPT, parameter_of
from mergekit_lr.verbs.merge.adapter_values import row_lengths


def assembled(plan: AdapterPlan, journal: Journal) -> tuple[Adapter, tuple[MergedTensor, ...]]:
    """The merged adapter, mapped from the journal, and the figures of its parts; budgets are spent here."""
    adapter = _base_and_config(plan)
    for step in plan.steps:
        if step.part == "change":
            _put_change(plan, journal, step, adapter)
        elif step.part == "saved":
            tensor = journal.tensor(step.label, "full")
            adapter.saved[step.name] = tensor + adapter.saved.pop(step.name, torch.zeros((), dtype=tensor.dtype))
        elif step.part == "rows":
            adapter.token_rows[step.name] = (list(step.rows), journal.tensor(step.label, "full"))
        else:
            weight = adapter.weights[step.name]
            beside = {step.part: journal.tensor(step.label, "full")}
            adapter.weights[step.name] = replace(weight, delta=_of_some_rank(weight.delta), **beside)
    lost = {step.label: journal.figures[step.label]["lost"] for step in plan.steps}
    output = plan.recipe.document.output
    uncut = {name: weight for name, weight in adapter.weights.items() if "energy" not in journal.figures[name]}
    if uncut and (output.energy is not None or output.size is not None):
        limit = {"energy": output.energy} if output.energy is not None else {"size": output.size}
        keys = ("memory", "device", "threads")
        dtype = str(plan.stored_dtype).removeprefix("torch.")
        squeezed = compress(
            replace(adapter, weights=uncut), dtype=dtype, **limit, **{key: plan.options[key] for key in keys}
        )
        assert squeezed.adapter is not None
        adapter = replace(adapter, weights=adapter.weights | squeezed.adapter.weights)
        lost |= {module.name: lost[module.name] + module.squared_error for module in squeezed.modules}
    return _with_all_magnitudes(plan, adapter), _figures(plan, journal, adapter, lost)


def report_of(plan: AdapterPlan, tensors: tuple[MergedTensor, ...], out: str | None, started: float) -> MergeReport:
    """The report of a merge into an adapter."""
    return MergeReport(
        out=out,
        kind="adapter",
        method=plan.recipe.method.name,
        space=plan.recipe.document.space,
        base=plan.base.ref if plan.base is not None else _base_ref(plan),
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
        format=plan.to,
        target=plan.recipe.document.output.target,
        similarity=plan.similarity,
    )


def named(plan: AdapterPlan, adapter: Adapter) -> Adapter:
    """The adapter under the names of its dialect, from those that its sources share."""
    return named_for(adapter, plan.adapters[0].dialect, plan.to, plan.recipe.document.output.component).adapter


def write(plan: AdapterPlan, adapter: Adapter, folder: Path) -> tuple[Path, tuple[str, ...]]:
    """Write the adapter in its dialect into ``folder``; its file, and what a user should know of it.

    Raises:
        LrmergeError: the dialect, or the server that it is meant for, cannot hold it.
    """
    dtype, target = plan.stored_dtype, plan.recipe.document.output.target
    if plan.to != "peft":
        kept = {name: weight for name, weight in adapter.weights.items() if weight.delta.rank}
        weights = {name: replace(weight, delta=weight.delta.to(dtype)) for name, weight in kept.items()}
        WRITERS[plan.to](replace(adapter, weights=weights), folder / OutputFile.FILE)
        return folder / OutputFile.FILE, ()
    notes: tuple[str, ...] = ()
    if target is not None:
        adapter, notes = fit(adapter, target, plan.layout)
    save_peft(adapter, folder, plan.layout, dtype=dtype)
    if target in SERVERS:
        rewrite_config(folder)
    return folder / PEFT_FILE, notes


def _base_and_config(plan: AdapterPlan) -> Adapter:
    """An adapter of nothing yet: its base, and what stays true of the sources' configurations."""
    modules = [module for one in plan.adapters for module in one.adapter.config.get("modules_to_save") or ()]
    config = {"modules_to_save": list(dict.fromkeys(modules))} if modules else {}
    for one in plan.adapters:
        config = {k: v for k, v in one.adapter.config.items() if k in KEPT and v is not None} | config
    return Adapter({}, base=plan.base.ref if plan.base is not None else _base_ref(plan), config=config)


def _base_ref(plan: AdapterPlan) -> str | None:
    return next((one.adapter.base for one in plan.adapters if one.adapter.base), None)


def _put_change(plan: AdapterPlan, journal: Journal, step: Step, adapter: Adapter) -> None:
    """A merged difference: factors, or in full; a vector's goes onto the base's own where PEFT has no place for it."""
    if "full" not in journal.keys(step.label):
        factors = LowRank(journal.tensor(step.label, "A"), journal.tensor(step.label, "B"))
        adapter.weights[step.name] = AdaptedWeight(step.kind, factors, step.shape)
        return
    full, parameter = journal.tensor(step.label, "full"), parameter_of(plan.onto, step.name)
    if full.ndim > 1 or plan.to != "peft" or plan.kind == "model" or parameter is None or plan.onto is None:
        adapter.added[step.name] = full
    elif any(other.part == "saved" and other.name == step.name for other in plan.steps):
        adapter.saved[step.name] = full  # the merged value is put on top
    else:
        own = plan.onto.read(parameter)
        adapter.saved[step.name] = (own.float() + full).to(own.dtype)


def _of_some_rank(delta: LowRank) -> LowRank:
    """At least one direction, of zeros: a bias or a magnitude needs factors to stand beside."""
    return delta if delta.rank else LowRank(padded(delta.A, 1, -2), padded(delta.B, 1, -1))


def _with_all_magnitudes(plan: AdapterPlan, adapter: Adapter) -> Adapter:
    """PEFT has DoRA on all weights or on none: a weight that no adapter rescales gets the lengths that it has."""
    bare = [name for name, weight in adapter.weights.items() if weight.magnitude is None]
    if plan.to != "peft" or plan.onto is None or not 0 < len(bare) < len(adapter.weights):
        return adapter
    weights = dict(adapter.weights)
    for name in bare:
        parameter, weight = parameter_of(plan.onto, name), weights[name]
        if parameter is not None:
            matrix = as_matrix(plan.onto.read(parameter), parameter.kind)
            weights[name] = replace(weight, magnitude=row_lengths(matrix, weight.delta))
    return replace(adapter, weights=weights)


def _figures(plan: AdapterPlan, journal: Journal, adapter: Adapter, lost: dict[str, float]) -> tuple[MergedTensor, ...]:
    merged = []
    for step in plan.steps:
        weight = adapter.weights.get(step.name) if step.part == "change" else None
        rank = weight.delta.rank if weight is not None else None
        rule, figures = plan.rules[step.label], journal.figures[step.label]
        # An average of values, without a base, is no change of a size.
        norm, opcm = 0.0 if step.averaged else figures["norm"], figures.get("opcm")
        merged.append(MergedTensor(step.label, step.size, "merged", rule, norm, lost[step.label], rank, opcm))
    left = [label for label, state in plan.states.items() if state != "merged"]
    return (*merged, *(MergedTensor(label, (), plan.states[label], plan.rules[label], 0.0, 0.0) for label in left))
