"""The stages of merging models: read every model's tensor, merge a batch of equal ones, round once and write."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.shards import Output
from mergekit_lr.errors import FormatError, LrmergeError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.merge_tensors import merge_tensors
from mergekit_lr.methods.opcm import Tally
from mergekit_lr.verbs.apply.change import squared
from mergekit_lr.verbs.merge.earlier import record
from mergekit_lr.verbs.merge.layers import Job
from mergekit_lr.verbs.merge.plan import MergePlan, in_blocks, is_copy, used_by
from mergekit_lr.verbs.merge.streaming import stream


class Done(NamedTuple):
    """A tensor of the result in its dtype, None where it is written already; and figures that JSON can hold."""

    tensor: Tensor | None
    figures: dict[str, Any]


@dataclass(frozen=True)
class Merging:
    """The three stages of one run; ``write`` is called from one thread."""

    plan: MergePlan
    output: Output
    journal: Journal

    def read(self, batch: Batch) -> list[list[Tensor]]:
        """For every node its inputs, and behind them its base where it has one."""
        if in_blocks(self.plan.recipe, batch.nodes[0].work):
            job: Job = batch.nodes[0].work
            for item in used_by(self.plan.recipe, job) if job.alignment is None else ():
                item.source.announce(item.name)
            return []
        return [self._read(node.work) for node in batch.nodes]

    def _read(self, job: Job) -> list[Tensor]:
        """A job's tensors, those with a row for each token in the order of the result's vocabulary."""
        used = used_by(self.plan.recipe, job)
        return [item.source.read(item.name) for item in used] if job.alignment is None else job.alignment.read(used)

    def compute(self, batch: Batch, inputs: list[list[Tensor]]) -> list[Done]:
        """The merged tensors of a batch, all of one shape and with one set of arguments."""
        jobs: list[Job] = [node.work for node in batch.nodes]
        if in_blocks(self.plan.recipe, jobs[0]):
            return [Done(None, stream(self.plan, jobs[0], self.output))]
        if is_copy(self.plan.recipe, jobs[0]):
            return [self._stored(job, held[0], held) for job, held in zip(jobs, inputs, strict=True)]
        tallies: list[Tally] = []
        merged = self._merged(jobs, inputs, tallies)
        done = [self._stored(job, one, held) for job, one, held in zip(jobs, merged, inputs, strict=True)]
        each = len(tallies) // len(jobs)  # one for every matrix of a tensor
        return [
            one._replace(figures=one.figures | record(tallies[i * each : (i + 1) * each])) for i, one in enumerate(done)
        ]

    def write(self, batch: Batch, done: list[Done]) -> None:
        """Put every tensor at its place, then say in the journal that it is there."""
        for node, one in zip(batch.nodes, done, strict=True):
            if one.tensor is not None:
                self.output.write(node.name, 0, one.tensor)
        for node, one in zip(batch.nodes, done, strict=True):
            self.journal.add(node.name, {}, one.figures)

    def _merged(self, jobs: list[Job], inputs: list[list[Tensor]], tallies: list[Tally]) -> list[Tensor]:
        """The merged tensors; of a method that can be continued with what is needed for that in ``tallies``."""
        job, shape = jobs[0], inputs[0][0].shape
        device, method = self.plan.resources.device, self.plan.recipe.method
        vectors = len(shape) < 2
        names = [job.name for job in jobs]
        if len(jobs) == 1:
            columns = [self._matrix(jobs[0], tensor.to(device)) for tensor in inputs[0]]
            matrices = math.prod(columns[0].shape[:-2]) if columns[0].ndim > 2 else 1
            names = names if matrices == 1 else [f"{job.name}[{i}]" for i in range(matrices)]
        else:
            columns = [torch.stack(column).to(device) for column in zip(*inputs, strict=True)]
        models = columns[: len(job.inputs)]
        base = widened(columns[-1]) if job.base is not None else None
        earlier = [tally for job in jobs for tally in job.earlier]
        provided: dict[str, Any] = {"earlier": earlier, "tallies": tallies} if method.continues else {}
        # The result has the dtype of the first input: wide, so that it is rounded once, on write.
        models[0] = widened(models[0])
        try:
            merged = merge_tensors(
                method.name,
                models,
                base=base,
                seed=self.plan.seed,
                name_of_tensor=names if len(names) > 1 else names[0],
                models=[f"{i}" for i in range(len(models))],
                vectors=vectors and len(jobs) > 1,
                **job.arguments,
                **provided,
            )
        except LrmergeError as error:
            raise type(error)(f"{names[0]}: {error}") from None
        dense = merged.dense() if isinstance(merged, LowRank) else merged
        return list(dense.cpu().unbind()) if len(jobs) > 1 else [dense.cpu().reshape(shape)]

    def _matrix(self, job: Job, tensor: Tensor) -> Tensor:
        """A convolution's kernel flat behind its first axis; a stack of matrices as it is."""
        return tensor.flatten(1) if tensor.ndim > 2 and job.template.name in job.template.source.flat else tensor

    def _stored(self, job: Job, exact: Tensor, held: list[Tensor]) -> Done:
        """The tensor rounded, with its distance from the template's and what rounding lost."""
        dtype = self.plan.outputs[job.name][0]
        if is_copy(self.plan.recipe, job):
            return Done(exact if exact.dtype is dtype else exact.to(dtype), {})
        # A sum of all entries is finite only where each of them is.
        if not math.isfinite(float(exact.sum())):
            self._refuse_nan(job, exact, held)
        stored = exact.to(dtype)
        lost = 0.0 if stored.dtype is exact.dtype else squared(stored.to(exact.dtype) - exact)
        if not math.isfinite(lost):
            narrow = str(dtype).removeprefix("torch.")
            raise FormatError(f"{job.name}: a new value is too large for {narrow}; choose another dtype")
        origin = held[-1] if job.base is not None else held[0]
        return Done(stored, {"change": squared(exact - origin.to(exact.dtype).reshape(exact.shape)), "rounding": lost})

    def _refuse_nan(self, job: Job, exact: Tensor, held: list[Tensor]) -> None:
        """Say where a NaN or Inf comes from, if there is one: a sum may also be too large by itself."""
        for item, tensor in zip(used_by(self.plan.recipe, job), held, strict=True):
            if not bool(torch.isfinite(tensor.float()).all()):
                raise FormatError(f"{item.source.ref}: tensor {item.name} holds NaN or Inf; the checkpoint is damaged")
        if not bool(torch.isfinite(exact).all()):
            name = self.plan.recipe.method.name
            raise FormatError(f"{job.name}: {name} gives NaN or Inf with {job.arguments}; choose other parameters")
