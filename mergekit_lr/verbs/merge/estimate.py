"""How long the arithmetic of a merge takes: steps of its plan, tried for a moment on small matrices and scaled up.

A trial goes through the stages of the run itself, on the plan's device with all its workers, so the method, the number
of models, their dtypes and what the workers take from each other are in it. Models are known by their headers alone,
so random numbers stand for them; of adapters the factors are at hand. What is not counted: reading and writing, which
the disk and the page cache decide; vectors, biases and saved values, which are small; and what turns an adapter of
another type than LoRA into a change.

For matrices (m, n) the work of most methods is m n, of spectral ones m n min(m, n) (``Method.spectral``); factors
are tried as they are. How fast it is done differs with the size, so an estimate is right within a factor of two.
"""

from __future__ import annotations

import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Hashable, Iterator
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.shards import MemoryOutput
from mergekit_lr.graph.journal import NoJournal
from mergekit_lr.graph.node import Cost, Node
from mergekit_lr.graph.run import run
from mergekit_lr.graph.schedule import Batch, Schedule
from mergekit_lr.methods.blocks import STEP, step_on
from mergekit_lr.methods.delta import Delta
from mergekit_lr.verbs.apply.compute import Application
from mergekit_lr.verbs.apply.plan import plan_apply
from mergekit_lr.verbs.merge.adapter_compute import AdapterMerging
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan
from mergekit_lr.verbs.merge.adapter_rules import is_dense
from mergekit_lr.verbs.merge.compute import Merging
from mergekit_lr.verbs.merge.layers import Job
from mergekit_lr.verbs.merge.plan import MergePlan, in_blocks, is_copy, used_by
from mergekit_lr.verbs.merge.sources import Input, open_source

MOMENT = 0.1  # seconds that a trial aims at
LONG = 1.0  # seconds of a first round beside which warming up (imports, memory) is little: no second one
ROUNDS = 8  # of a trial, at most
SIDES = {"cpu": 384, "cuda": 2048}  # of a trial's matrices under spectral methods, the smaller one at most
BLOCKS = 16 * STEP  # elements of a trial's matrices that go in blocks, at most
WHOLE = 8 * STEP  # of others; a device that has larger blocks gets one of those
NAME = "layer.weight"  # of random numbers


class Trial(NamedTuple):
    """What is tried: some batches, and the stages that they go through."""

    batches: tuple[Batch, ...]
    read: Callable[[Batch], Any]
    compute: Callable[[Batch, Any], Any]
    write: Callable[[Batch, Any], None]


def seconds(plan: MergePlan | AdapterPlan) -> float:
    """About how long the arithmetic of a plan takes on its device, with all its workers.

    Reading and writing are not counted. It costs about a second itself, for steps of the plan are tried.

    Raises:
        LrmergeError: the method refuses its parameters, or a change that is computed from the base cannot be.
    """
    return sum(_of_models(plan) if isinstance(plan, MergePlan) else _of_adapters(plan), 0.0)


def measured(trial: Trial, rounds: int, workers: int) -> float:
    """Seconds of a run in which every worker does all batches of a trial ``rounds`` times."""
    schedule = Schedule(trial.batches * (rounds * workers), workers, budget=sys.maxsize, peak=0)
    started = time.perf_counter()
    run(schedule, read=trial.read, compute=trial.compute, write=trial.write)
    return time.perf_counter() - started


def _once(trial: Trial, workers: int) -> float:
    """Seconds by which doing it once more makes a run longer; a first round warms up, and counts only if it is long."""
    first = measured(trial, 1, workers)
    if first > LONG:
        return first / workers
    rounds = max(1, min(ROUNDS, round(MOMENT / max(first, 1e-9))))
    return measured(trial, rounds, workers) / (rounds * workers)


def _workers(plan: MergePlan | AdapterPlan) -> int:
    return min(plan.resources.workers, len(plan.schedule.batches))


def _of_models(plan: MergePlan) -> Iterator[float]:
    """Seconds of each kind of job: what its inputs are, and whether it goes in blocks."""
    groups: dict[Hashable, list[Job]] = defaultdict(list)
    for job in plan.jobs:
        shape = plan.outputs[job.name][1]
        if len(shape) > 1 and math.prod(shape) and not is_copy(plan.recipe, job):
            dtypes = tuple(item.header[0] for item in used_by(plan.recipe, job))
            groups[in_blocks(plan.recipe, job), dtypes, len(job.inputs)].append(job)
    for jobs in groups.values():
        sizes = {job: _matrices(plan, job) for job in jobs}
        work = {job: count * _work(m, n, plan.recipe.method.spectral) for job, (count, m, n) in sizes.items()}
        largest = max(jobs, key=lambda job: work[job])
        shape = _sides(plan, *sizes[largest][1:], plan.recipe.method.spectral, in_blocks(plan.recipe, largest))
        times = sum(work.values()) / _work(*shape, plan.recipe.method.spectral)
        yield times * _once(_merging(plan, largest, shape), _workers(plan))


def _matrices(plan: MergePlan, job: Job) -> tuple[int, int, int]:
    """How many matrices the method sees in a tensor, and their sides."""
    shape = plan.outputs[job.name][1]
    if job.template.name in job.template.source.flat:
        return 1, shape[0], math.prod(shape[1:])
    return math.prod(shape[:-2]), shape[-2], shape[-1]


def _merging(plan: MergePlan, job: Job, shape: tuple[int, int]) -> Trial:
    """``job`` on matrices of random numbers: normal weights, and models that differ a little from the base."""
    outputs = {job.name: (plan.outputs[job.name][0], shape)}
    origin = _normal(shape, seed=0)

    def model(like: Input, seed: int = 0) -> Input:
        tensor = origin + 0.1 * _normal(shape, seed=seed) if seed else origin
        return Input(open_source(Checkpoint.from_tensors({NAME: tensor.to(like.header[0])})), NAME)

    inputs = tuple(model(one, i) for i, one in enumerate(job.inputs, 1))
    base = model(job.base) if job.base is not None else None
    template = base or inputs[0]
    own = replace(job, inputs=inputs, base=base, template=template, alignment=None, earlier=job.earlier[:1])
    stages = Merging(replace(plan, outputs=outputs), MemoryOutput(outputs, {}), NoJournal())
    return Trial((_batch(own),), stages.read, stages.compute, stages.write)


def _of_adapters(plan: AdapterPlan) -> Iterator[float]:
    """Seconds of each kind of change: of whole matrices together, of factors for every size; then of the base's."""
    method, output = plan.recipe.method, plan.recipe.document.output
    # The rank that an energy or a size leaves grows with the sides of the matrix.
    spectral = method.spectral or (plan.truncated and output.rank is None)
    stages = AdapterMerging(plan, NoJournal())
    changes = [step for step in plan.steps if step.part == "change" and len(step.size) > 1]
    groups: dict[Hashable, list[Step]] = defaultdict(list)
    for step in changes:
        kinds = tuple(one.rank if isinstance(one, LowRank) else type(one) for one in step.given)
        groups[kinds, None if is_dense(plan.recipe, step) else step.size].append(step)

    def work(step: Step) -> float:
        *lead, m, n = step.size
        return math.prod(lead) * _work(m, n, spectral)

    for steps in groups.values():
        largest = max(steps, key=work)
        made = replace(largest, given=tuple(one() if callable(one) else one for one in largest.given))
        *_, m, n = made.size
        own = _corner(made, _sides(plan, m, n, spectral)) if is_dense(plan.recipe, made) else made
        trial = Trial((_batch(own),), stages.read, stages.compute, stages.write)
        yield sum(map(work, steps)) / work(own) * _once(trial, _workers(plan))
    if plan.kind == "model" and changes:
        yield _baking(plan, changes)


def _corner(step: Step, sides: tuple[int, int]) -> Step:
    """A step on the first rows and columns of its matrices, of the first one where it is a stack."""
    (rows, columns), stack = map(slice, sides), [slice(1)] * (len(step.size) - 2)

    def cut(one: Any) -> Delta | None:
        if isinstance(one, LowRank):
            return replace(one, A=one.A[(*stack, slice(None), columns)], B=one.B[(*stack, rows)])
        return None if one is None else one[(*stack, rows, columns)]

    given, size = tuple(map(cut, step.given)), (*[1] * len(stack), *sides)
    return replace(step, given=given, size=size, shape=None, earlier=step.earlier[:1])


def _baking(plan: AdapterPlan, changes: list[Step]) -> float:
    """Seconds of adding what was merged to the base, of which random numbers stand for one matrix."""
    assert plan.base is not None
    *_, m, n = max((step.size for step in changes), key=lambda size: math.prod(size[-2:]))
    rows, columns = _sides(plan, m, n, spectral=False)
    ranks = [sum(one.rank for one in step.given if isinstance(one, LowRank)) for step in changes]
    rank = plan.recipe.document.output.rank or max(ranks) or 1
    delta = LowRank(_normal((rank, columns), seed=1), _normal((rows, rank), seed=2))
    dtype = next((info.dtype for info in plan.base.tensors.values() if len(info.shape) > 1), torch.float32)
    base = Checkpoint.from_tensors({NAME: _normal((rows, columns), seed=0).to(dtype)})
    options = {key: plan.options[key] for key in ("dtype", "device", "threads")}
    onto = plan_apply(base, [(Adapter({NAME: AdaptedWeight(Kind.LINEAR, delta)}), 1.0)], **options)
    stages = Application.of(onto, MemoryOutput(onto.outputs, {}), NoJournal())
    trial = Trial(onto.schedule.batches, stages.read, stages.compute, stages.write)
    return sum(math.prod(step.size) for step in changes) / (rows * columns) * _once(trial, _workers(plan))


def _batch(step: Job | Step) -> Batch:
    return Batch((Node(step.name, "", ("", 0), Cost(1, 0, 0.0), step),))


def _normal(shape: tuple[int, int], *, seed: int) -> Tensor:
    return 0.02 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def _sides(plan: MergePlan | AdapterPlan, m: int, n: int, spectral: bool, blocked: bool = False) -> tuple[int, int]:
    """The sides of a matrix, smaller in proportion where a trial does not need all of it."""
    device = plan.resources.device
    elements = max(BLOCKS if blocked else WHOLE, step_on(device))
    share = SIDES[device.type] / min(m, n) if spectral else math.sqrt(elements / (m * n))
    return (m, n) if share >= 1 else (math.ceil(m * share), math.ceil(n * share))


def _work(m: int, n: int, spectral: bool) -> float:
    """What the cost of a method grows with."""
    return float(m * n * (min(m, n) if spectral else 1))
