"""How the inputs of a merge relate, module by module: a pass of its own over them, made only where it is asked for.

Norms and inner products of the deltas are exact. Signs are counted on a sample of rows; shared directions and
interference are those of the leading ``DIRECTIONS`` singular triplets of a dense delta, and of all triplets of factors.
The figures and their sources are those of ``mergekit_lr.verbs.compare``.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import Any, TypeAlias

import torch
from lrgpu.random import stream
from lrgpu.truncated import truncated_svd

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.graph.schedule import Batch, schedule
from mergekit_lr.methods.delta import Delta, as_dense, gram, widened
from mergekit_lr.verbs.compare import (
    CompareReport,
    ModuleComparison,
    compare_factors,
    compare_triplets,
    opposite_signs,
    sampled_rows,
    short_names,
    summary,
)
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan
from mergekit_lr.verbs.merge.adapter_steps import Step
from mergekit_lr.verbs.merge.layers import Job
from mergekit_lr.verbs.merge.plan import MergePlan, used_by

Figures: TypeAlias = dict[str, Any]

DIRECTIONS = 16
TOLERANCE = 0.05  # of the error of those triplets: enough for a map


def compare_inputs(
    plan: MergePlan | AdapterPlan, progress: Callable[[Progress], None] | None = None
) -> CompareReport | None:
    """How the inputs of a merge relate: reads every tensor once more. None where fewer than two change the same.

    Of models the changes from the base are compared, so without a base there is nothing to compare.
    """
    if isinstance(plan, AdapterPlan):
        refs, nodes = [one.ref for one in plan.adapters], [_node_of_step(step) for step in plan.steps]
    else:
        refs = [ref for ref in plan.sources if ref != plan.recipe.document.base_model]
        numbers = {id(plan.sources[ref]): number for number, ref in enumerate(refs)}
        nodes = [_node_of_job(plan, job, numbers) for job in plan.jobs]
    available = plan.resources
    batches = schedule([node for node in nodes if node], budget=available.working, workers=available.workers)
    figures: dict[str, Figures] = {}

    def measure(batch: Batch, _: None) -> list[Figures]:
        return [compared(node.name, node.work(), seed=plan.seed) for node in batch.nodes]

    def keep(batch: Batch, found: list[Figures]) -> None:
        figures.update(zip((node.name for node in batch.nodes), found, strict=True))

    run(batches, read=lambda batch: None, compute=measure, write=keep, progress=progress)
    order = [step.name for step in plan.steps] if isinstance(plan, AdapterPlan) else [job.name for job in plan.jobs]
    return _summed(refs, {name: figures[name] for name in order if name in figures})


def _node_of_step(step: Step) -> Node | None:
    """A module of adapters; only differences are compared."""
    if step.part != "change":
        return None

    def deltas() -> dict[int, Delta]:
        given = ((number, one() if callable(one) else one) for number, one in enumerate(step.given))
        return {number: one for number, one in given if one is not None}

    return Node(step.name, step.name, ("", 0), _cost(step.size, len(step.given), 1), deltas)


def _node_of_job(plan: MergePlan, job: Job, numbers: Mapping[int, int]) -> Node | None:
    """A tensor of models. numbers: ``id`` of a source to its number."""
    known = [(numbers[id(item.source)], item) for item in job.inputs if id(item.source) in numbers]
    if job.base is None or not job.merged or not known:
        return None

    def deltas() -> dict[int, Delta]:
        used = used_by(plan.recipe, job)
        read = [item.source.read(item.name) for item in used] if job.alignment is None else job.alignment.read(used)
        origin = widened(read[-1].to(plan.resources.device))
        held = dict(zip((id(item) for item in used), read, strict=True))
        flat = job.template.name in job.template.source.flat
        changes = {number: widened(held[id(item)].to(origin.device)) - origin for number, item in known}
        return {number: change.flatten(1) if flat else change for number, change in changes.items()}

    item = known[0][1]
    read = item.source.nbytes(item.name) * (len(known) + 1)
    return Node(job.name, job.name, item.source.place(item.name), _cost(item.header[1], len(known) + 1, read), deltas)


def _cost(shape: Sequence[int], count: int, read: int) -> Cost:
    entries = math.prod(shape)
    # As read and widened, the difference, and what the truncated SVD of one of them holds.
    return Cost(max(read, 1), read + 4 * entries * (2 * count + 2), 16.0 * entries * DIRECTIONS * count)


def compared(name: str, deltas: Mapping[int, Delta], *, seed: int) -> Figures:
    """Figures of one tensor. deltas: number of the input to its change (..., m, n), or a vector's (n,).

    Always ``tasks`` and ``norms``; of a matrix that two or more inputs change, all of a ``ModuleComparison``.
    """
    given = [delta if isinstance(delta, LowRank) else delta.reshape(-1, delta.shape[-1]) for delta in deltas.values()]
    norms = [math.sqrt(float(gram([delta]).sum())) for delta in given]
    kept = [(task, delta, norm) for task, delta, norm in zip(deltas, given, norms, strict=True) if 0 < norm < math.inf]
    tasks, changes = [task for task, _, _ in kept], [delta for _, delta, _ in kept]
    if len(tasks) < 2 or min(changes[0].shape[-2:]) < 2:
        return {"tasks": tasks, "norms": [norm for _, _, norm in kept]}
    factors = [delta for delta in changes if isinstance(delta, LowRank)]
    if len(factors) == len(changes):
        return asdict(compare_factors(name, tasks, factors, seed=seed))
    dense = [as_dense(delta).reshape(-1, delta.shape[-1]) for delta in changes]
    rows = sampled_rows(dense[0].shape[0], stream(seed, name, "signs")).to(dense[0].device)
    triplets = []
    for task, delta in zip(tasks, dense, strict=True):
        found = truncated_svd(delta, DIRECTIONS, tolerance=TOLERANCE, seeds=stream(seed, name, str(task)))
        some = found.S > found.S[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
        triplets.append((found.U[:, some].cpu(), found.S[some].double().cpu(), found.Vh[some].mT.cpu()))
    signs = opposite_signs([delta[rows] for delta in dense]).cpu()
    return asdict(compare_triplets(name, tasks, triplets, signs, inner=gram(dense).cpu()))


def _summed(refs: Sequence[str], figures: Mapping[str, Figures]) -> CompareReport | None:
    modules, alone = [], {}
    squares = torch.zeros(len(refs), dtype=torch.float64)
    for name, found in figures.items():
        for task, norm in zip(found["tasks"], found["norms"], strict=True):
            squares[task] += norm * norm
        if "inner" in found:
            modules.append(ModuleComparison(**found))
        elif len(found["tasks"]) == 1:
            alone[name] = found["tasks"][0]
    return summary(short_names(refs), squares.sqrt(), modules, alone) if modules else None
