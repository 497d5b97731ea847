"""Large tensors under elementwise methods: read, merged, rounded and written a block at a time.

What is held does not depend on the size of the tensor, and every pass finds its numbers in the cache.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import torch

from mergekit_lr.checkpoint.shards import Output
from mergekit_lr.errors import FormatError, LrmergeError
from mergekit_lr.methods.blocks import STEP, Blocks, Read, merge_blocks, step_on
from mergekit_lr.verbs.apply.change import squared
from mergekit_lr.verbs.merge.layers import Job
from mergekit_lr.verbs.merge.plan import MergePlan, is_copy, origin_of, used_by
from mergekit_lr.verbs.merge.sources import Input


def copy_blocks(plan: MergePlan, job: Job, output: Output) -> dict[str, Any]:
    """Copy a tensor to the result, rounded where it has another dtype there; no figures."""
    dtype, shape = plan.outputs[job.name]
    origin = origin_of(plan.recipe, job)
    part = job.parts([origin])
    for start, stop in _steps(0, math.prod(shape), STEP):
        output.write(job.name, start, part(origin, start, stop).to(dtype))
    return {}


def stream(plan: MergePlan, job: Job, output: Output) -> dict[str, Any]:
    """Merge a tensor into the result; its figures: squared norms of its change and of what rounding lost.

    Raises:
        FormatError: NaN or Inf in an input or in the result.
        UsageError: the method refuses the inputs.
    """
    if is_copy(plan.recipe, job):
        return copy_blocks(plan, job, output)
    dtype = plan.outputs[job.name][0]
    change = lost = 0.0
    try:
        for at, blocks, name in _matrices(plan, job):
            labels = [f"{i}" for i in range(len(job.inputs))]
            arguments = {"models": labels, "tensor": name, "seed": plan.seed, **job.arguments}
            for block, merged in merge_blocks(plan.recipe.method, blocks, **arguments):
                stored = merged.to(dtype)
                origin = block.base if block.base is not None else block.inputs[0]
                change += squared(merged - origin)
                if stored.dtype is not merged.dtype:
                    lost += squared(stored.to(merged.dtype) - merged)
                output.write(job.name, at + block.start, stored.cpu().reshape(-1))
    except LrmergeError as error:
        raise type(error)(f"{job.name}: {error}") from None
    if not math.isfinite(change + lost):
        _refuse(plan, job, change)
    return {"change": change, "rounding": lost}


def _matrices(plan: MergePlan, job: Job) -> Iterator[tuple[int, Blocks, str]]:
    """The matrices of a tensor, one unless it is a stack: where each begins, its blocks, and its name."""
    shape = plan.outputs[job.name][1]
    whole = math.prod(shape)
    flat = len(shape) == 2 or job.template.name in job.template.source.flat
    size = whole if flat else math.prod(shape[-2:])
    device = plan.resources.device
    part = job.parts(used_by(plan.recipe, job))

    for i, at in enumerate(range(0, whole, size)):

        def reader(item: Input, at: int = at) -> Read:
            return lambda start, stop: part(item, at + start, at + stop).to(device)

        blocks = Blocks(
            size,
            models=[reader(item) for item in job.inputs],
            base=reader(job.base) if job.base is not None else None,
            deltas=plan.recipe.method.takes == "deltas",
            step=step_on(device),
        )
        yield at, blocks, job.name if size == whole else f"{job.name}[{i}]"


def _refuse(plan: MergePlan, job: Job, change: float) -> None:
    """Say where a NaN or Inf comes from: an input, the method, or the dtype of the result."""
    used = used_by(plan.recipe, job)
    part = job.parts(used)
    for item in used:
        for start, stop in _steps(0, math.prod(plan.outputs[job.name][1]), STEP):
            if not bool(torch.isfinite(part(item, start, stop).float()).all()):
                raise FormatError(f"{item.source.ref}: tensor {item.name} holds NaN or Inf; the checkpoint is damaged")
    if math.isfinite(change):
        narrow = str(plan.outputs[job.name][0]).removeprefix("torch.")
        raise FormatError(f"{job.name}: a new value is too large for {narrow}; choose another dtype")
    name = plan.recipe.method.name
    raise FormatError(f"{job.name}: {name} gives NaN or Inf with {job.arguments}; choose other parameters")


def _steps(start: int, stop: int, step: int) -> Iterator[tuple[int, int]]:
    for at in range(start, stop, step):
        yield at, min(at + step, stop)
