"""From finished nodes to an adapter on disk: final ranks, factors, what is saved in full, report, card, manifest."""

from __future__ import annotations

import math
import re
import time
from dataclasses import replace
from pathlib import Path

import torch
from lrgpu.rank import allocate
from torch import Tensor

from mergekit_lr.adapter import peft
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft_write import at_every_end
from mergekit_lr.checkpoint.pair import read_whole, refuse_nan_in
from mergekit_lr.checkpoint.parameter import Parameter
from mergekit_lr.checkpoint.quantized import FP8
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.report.card import notes_of
from mergekit_lr.report.extraction import Carried, ExtractReport, ModuleFigures
from mergekit_lr.report.extraction_card import write_extraction_card
from mergekit_lr.report.inputs import Input
from mergekit_lr.report.manifest import manifest, write_manifest
from mergekit_lr.verbs.extract.plan import ExtractPlan, Step, Treatment, stored_per_rank

# Of one entry in a safetensors header beside its tensor's name in memory, and of what frames them all: the most.
HEADER_BYTES = 200
# PEFT's task type by the end of the class name that a config gives.
TASKS = {
    "ForCausalLM": "CAUSAL_LM",
    "LMHeadModel": "CAUSAL_LM",
    "ForConditionalGeneration": "SEQ_2_SEQ_LM",
    "ForSequenceClassification": "SEQ_CLS",
    "ForTokenClassification": "TOKEN_CLS",
    "ForQuestionAnswering": "QUESTION_ANS",
}


def final_ranks(plan: ExtractPlan, journal: Journal) -> dict[str, int]:
    """The rank of every decomposed parameter: what its rule chose, or its share of the byte budget.

    All experts of a stack get the rank of the one that needs most, as their factors share one tensor. The budget is of
    the whole file: what is saved in full and the header come first, then ranks that were asked for by pattern.

    Raises:
        UsageError: the budget does not even hold those, or no rank of any module.
    """
    spectra = {step.pair.name: _spectrum(step, journal) for step in _decomposed(plan)}
    ranks = {name: len(values) for name, values in spectra.items()}
    if plan.budget is None:
        return ranks
    shared = [step for step in _decomposed(plan) if not _has_own_rank(plan, step)]
    names, costs = [step.pair.name for step in shared], [_bytes_per_rank(plan, step) for step in shared]
    rule, left = plan.ranks.rule, plan.budget
    while True:
        # What the rest takes is known once it is known which modules have factors at all.
        bought = allocate(
            [spectra[name] for name in names], costs, left, max_rank=rule.max_rank, multiple_of=rule.multiple_of
        )
        ranks |= zip(names, bought, strict=True)
        excess = _file_bytes(plan, journal, ranks) - plan.budget
        nothing = not any(ranks.values()) and any(spectra.values())
        if nothing or (excess > 0 and not any(bought)):
            needed = plan.budget + max(excess, 0) + min(costs, default=0)
            raise UsageError(
                f"--size {plan.options['size']}: not even one rank fits beside what is saved in full; raise it to "
                f"{needed} bytes or more, or leave something out (--rest skip, --embeddings skip, --exclude)"
            )
        if excess <= 0:
            return ranks
        left = sum(cost * rank for cost, rank in zip(costs, bought, strict=True)) - excess


def saturated(plan: ExtractPlan, journal: Journal) -> dict[str, int]:
    """With a byte budget: the modules that would take all that was computed of them, to a rank to look further to.

    Their results are forgotten.
    """
    if plan.budget is None:
        return {}
    ranks = final_ranks(plan, journal)
    limit = plan.ranks.rule.max_rank
    deeper = {}
    for step in _decomposed(plan):
        name, known = step.pair.name, len(_spectrum(step, journal))
        full = min(step.pair.base.matrix_shape)
        if not _has_own_rank(plan, step) and ranks[name] == known and 0 < known < min(full, limit or full):
            deeper[name] = 2 * known
            for node in step.nodes:
                journal.forget(node.name)
    return deeper


def _has_own_rank(plan: ExtractPlan, step: Step) -> bool:
    return any(re.search(pattern, step.pair.name) for pattern in plan.options["rank_pattern"] or ())


def _bytes_per_rank(plan: ExtractPlan, step: Step) -> int:
    """Bytes of one unit of rank in the file, where a tie has its factors at every end."""
    return stored_per_rank(step) * len(plan.pairing.layout.ends(step.pair.name)) * plan.dtype.itemsize


def _file_bytes(plan: ExtractPlan, journal: Journal, ranks: dict[str, int]) -> int:
    """At most so many bytes has the file with these ranks: factors, what is saved in full, header."""
    layout = plan.pairing.layout
    slots = peft.carry(layout, _changed(plan, journal, ranks), full=_in_full(plan))
    total = HEADER_BYTES
    for step in _decomposed(plan):
        if rank := ranks[step.pair.name]:
            ends = layout.ends(step.pair.name)
            total += rank * _bytes_per_rank(plan, step) + sum(2 * (len(end.name) + HEADER_BYTES) for end in ends)
    for name, parameter in _sources(plan).items():
        if name in slots.saved:
            dtype = plan.finetuned.tensors[parameter.blocks[0][0].tensor].dtype
            itemsize = max(dtype.itemsize, 4 if dtype in FP8 else 1)  # what has a scale is saved in float32
            ends = layout.ends(name) if name in layout.by_name else (parameter,)
            total += sum(math.prod(parameter.shape) * itemsize + len(end.name) + HEADER_BYTES for end in ends)
    return total


def _sources(plan: ExtractPlan) -> dict[str, Parameter]:
    """By name what the fine-tune can give in full."""
    sources = {step.pair.name: step.pair.finetuned for step in plan.steps}
    return sources | {parameter.name: parameter for parameter in plan.pairing.added}


def assemble(plan: ExtractPlan, journal: Journal, out: str | None, started: float) -> tuple[Adapter, ExtractReport]:
    """The adapter, its factors still mapped from the journal, and the report."""
    ranks = final_ranks(plan, journal)
    slots = peft.carry(plan.pairing.layout, _changed(plan, journal, ranks), full=_in_full(plan))
    weights: dict[str, AdaptedWeight] = {}
    modules: list[ModuleFigures] = []
    others: list[Carried] = []
    for step in plan.steps:
        name = step.pair.name
        if name in slots.factors:
            weights[name] = _weight(step, journal, ranks[name])
            modules.append(_figures(step, journal, ranks[name]))
        else:
            others.append(_other(step, journal, slots))
    sources = _sources(plan)
    saved = {name: read_whole(plan.finetuned, p) for name, p in sources.items() if name in slots.saved}
    for name, tensor in saved.items():
        refuse_nan_in(tensor, sources[name], plan.finetuned)
    others += [_addition(parameter, slots) for parameter in plan.pairing.added]
    ties = plan.pairing.layout.ties
    others += [Carried(name, "tied", 0.0, source) for name, source in ties.items() if name not in sources]
    others += [Carried(name, "unused", 0.0, reason) for name, reason in plan.pairing.unused.items()]
    report = ExtractReport(
        out=out,
        base=plan.base.ref,
        finetuned=plan.finetuned.ref,
        dtype=plan.options["dtype"],
        layout=plan.pairing.layout.source,
        modules=tuple(modules),
        others=tuple(others),
        notes=slots.notes,
        adapter_bytes=sum(m.stored for m in modules) * plan.dtype.itemsize + sum(t.nbytes for t in saved.values()),
        finetuned_bytes=plan.finetuned.nbytes,
        read_bytes=plan.schedule.cost.read,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - started,
    )
    return Adapter(weights, saved, base=plan.base.ref), report


def write(plan: ExtractPlan, adapter: Adapter, report: ExtractReport, folder: Path, started: float) -> ExtractReport:
    """Adapter, card and manifest into ``folder``; the report with the time and memory that all of it took."""
    architecture = (plan.finetuned.config.get("architectures") or ["AutoModel"])[0]
    task = next((task for end, task in TASKS.items() if architecture.endswith(end)), None)
    peft.save(adapter, folder, dtype=plan.dtype, layout=plan.pairing.layout, task_type=task)
    size = (folder / "adapter_model.safetensors").stat().st_size
    report = replace(report, adapter_bytes=size, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)
    inputs = {"base": plan.base, "finetuned": plan.finetuned}
    roles = (("base", plan.base), ("fine-tune", plan.finetuned))
    origins = [Input.of(role, one.ref, one.folder, config=one.config) for role, one in roles]
    report = replace(report, notes=(*report.notes, *notes_of(origins)))
    write_extraction_card(report, origins, plan.options, folder)
    write_manifest(folder, manifest("extract", inputs, plan.options, report.to_json()))
    return report


def in_memory(plan: ExtractPlan, adapter: Adapter, report: ExtractReport) -> ExtractReport:
    """The report with its adapter, at every end of a tie, every tensor copied out of the journal's files."""
    weights = {
        name: replace(w, delta=LowRank(w.delta.A.clone(), w.delta.B.clone(), w.delta.scaling))
        for name, w in at_every_end(adapter, plan.pairing.layout).items()
    }
    saved = {name: tensor.clone() for name, tensor in adapter.saved.items()}
    return replace(report, adapter=replace(adapter, weights=weights, saved=saved))


def _decomposed(plan: ExtractPlan) -> list[Step]:
    return [step for step in plan.steps if step.treatment is Treatment.DECOMPOSE]


def _spectrum(step: Step, journal: Journal) -> list[float]:
    """Singular values of the delta; of a stack, the root of the summed squares over its experts."""
    values = [journal.figures[node.name].get("singular_values", []) for node in step.nodes]
    if len(values) == 1:
        return values[0]
    length = max(map(len, values))
    return [sum(v[i] ** 2 for v in values if i < len(v)) ** 0.5 for i in range(length)]


def _norm(step: Step, journal: Journal) -> float:
    return sum(journal.figures[node.name]["squared_norm"] for node in step.nodes)


def _changed(plan: ExtractPlan, journal: Journal, ranks: dict[str, int]) -> set[str]:
    """Names of what the adapter has to carry."""

    def carried(step: Step) -> bool:
        if step.treatment is Treatment.DECOMPOSE:
            return ranks[step.pair.name] > 0
        return step.treatment is Treatment.KEEP or (step.treatment is Treatment.COMPARE and _norm(step, journal) > 0)

    return {step.pair.name for step in plan.steps if carried(step)} | {p.name for p in plan.pairing.added}


def _in_full(plan: ExtractPlan) -> set[str]:
    full = {step.pair.name for step in plan.steps if step.treatment in (Treatment.COMPARE, Treatment.KEEP)}
    return full | {parameter.name for parameter in plan.pairing.added}


def _addition(parameter: Parameter, slots: peft.Carry) -> Carried:
    """What becomes of a parameter that the base does not have: there is no change of it, only the whole."""
    name = parameter.name
    if name in slots.saved:
        return Carried(name, "saved", 0.0, "only the fine-tune has it")
    return Carried(name, "left out", 0.0, f"only the fine-tune has it; {slots.refused[name]}")


def _other(step: Step, journal: Journal, slots: peft.Carry) -> Carried:
    name, norm = step.pair.name, _norm(step, journal)
    if name in slots.saved:
        note = "loaded into the base itself" if name in slots.base else ""
        return Carried(name, "saved", norm, step.reason or note)
    if name in slots.refused:
        return Carried(name, "left out", norm, slots.refused[name])
    if norm > 0:
        return Carried(name, "left out", norm, step.reason or "the size budget")
    return Carried(name, "unchanged", 0.0, step.reason)


def _weight(step: Step, journal: Journal, rank: int) -> AdaptedWeight:
    parameter = step.pair.base
    factors = [_padded(journal, node.name, rank) for node in step.nodes]
    if len(factors) == 1 and len(parameter.shape) != 3:
        a, bt = factors[0]
    else:
        a, bt = (torch.stack(parts) for parts in zip(*factors, strict=True))
    return AdaptedWeight(parameter.kind, LowRank(a, bt.mT), shape=parameter.shape)


def _padded(journal: Journal, name: str, rank: int) -> tuple[Tensor, Tensor]:
    """The first ``rank`` rows of A and of B^T; zeros below where an expert needs fewer than its stack has."""
    parts = []
    for key in ("A", "Bt"):
        tensor = journal.tensor(name, key)[:rank]
        missing = rank - tensor.shape[0]
        parts.append(torch.cat([tensor, tensor.new_zeros(missing, tensor.shape[1])]) if missing else tensor)
    return parts[0], parts[1]


def _figures(step: Step, journal: Journal, rank: int) -> ModuleFigures:
    figures = [journal.figures[node.name] for node in step.nodes]
    kept = sum(sum(value * value for value in f.get("singular_values", [])[:rank]) for f in figures)
    norm = _norm(step, journal)
    return ModuleFigures(
        name=step.pair.name,
        kind=str(step.pair.base.kind),
        shape=step.pair.base.shape,
        rank=rank,
        stored=rank * stored_per_rank(step),
        squared_norm=norm,
        kept=min(kept, norm),
        excess=max(f.get("excess", 0.0) for f in figures),
        seconds=sum(f["seconds"] for f in figures),
        singular_values=tuple(_spectrum(step, journal)),
    )
