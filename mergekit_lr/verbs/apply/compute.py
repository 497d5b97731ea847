"""The stages of applying adapters: read the base's rows, change and round them, put them at their places."""

from __future__ import annotations

import math
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.shards import Header, Output
from mergekit_lr.errors import FormatError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.verbs.apply.change import Changed, changed, own_shape, replacement, squared
from mergekit_lr.verbs.apply.plan import ApplyPlan, Task
from mergekit_lr.verbs.apply.rounding import rounded
from mergekit_lr.verbs.apply.rows import join, read_span, split


class Piece(NamedTuple):
    """One finished node: a tensor for each of its spans, in the output's dtype, and figures that JSON can hold."""

    parts: list[Tensor]
    figures: dict[str, Any]


@dataclass
class Application:
    """The three stages of one run; ``write`` is called from one thread."""

    base: Checkpoint
    outputs: Mapping[str, Header]
    device: torch.device
    seed: int | None
    output: Output
    journal: Journal
    _memory: threading.local = field(default_factory=threading.local)

    @classmethod
    def of(cls, plan: ApplyPlan, output: Output, journal: Journal) -> Application:
        """The stages for ``plan``."""
        return cls(plan.base, plan.outputs, plan.resources.device, plan.seed, output, journal)

    def read(self, batch: Batch) -> list[list[Tensor]]:
        """The base's rows for every span of every node; none where the base has none."""
        tasks: list[Task] = [node.work for node in batch.nodes]
        return [[read_span(self.base, span) for span in task.spans if span.source is not None] for task in tasks]

    def compute(self, batch: Batch, inputs: list[list[Tensor]]) -> list[Piece]:
        """New rows for every node."""
        return [self._piece(node.work, parts) for node, parts in zip(batch.nodes, inputs, strict=True)]

    def write(self, batch: Batch, pieces: list[Piece]) -> None:
        """Put every piece at its place, then say in the journal that it is there."""
        for node, piece in zip(batch.nodes, pieces, strict=True):
            for span, part in zip(node.work.spans, piece.parts, strict=True):
                self.output.write(span.name, span.start * span.width, part)
        for node, piece in zip(batch.nodes, pieces, strict=True):
            self.journal.add(node.name, {}, piece.figures)

    def _piece(self, task: Task, parts: list[Tensor]) -> Piece:
        if task.target is None:
            return Piece([self._converted(task, parts[0])], {})
        part = task.part
        assert part is not None
        rows, columns = part.stop - part.start, own_shape(part.parameter)[1]
        wide = any(tensor.dtype is torch.float64 for tensor in parts)
        dtype = torch.float64 if wide else torch.float32
        if task.target.fresh:
            new = replacement(part, task.target.changes[0], dtype=dtype, device=self.device)
            result = Changed(new, squared(new))
        else:
            old = join(parts, task.spans).to(self.device)
            out = self._buffer(rows * columns, dtype).view(rows, columns)
            result = changed(old, part, task.target.changes, out=out)
        # A sum of all entries is finite only where each of them is.
        if not math.isfinite(result.squared_norm) or not math.isfinite(float(result.rows.sum())):
            self._refuse_nan(task, parts, result)
        spread = split(result.rows, task.spans)
        stored = [self._round(span, exact) for span, exact in zip(task.spans, spread, strict=True)]
        lost = sum(_lost(narrow, exact) for narrow, exact in zip(stored, spread, strict=True))
        if not math.isfinite(lost):
            narrow = str(stored[0].dtype).removeprefix("torch.")
            raise FormatError(f"{task.target.name}: a new value is too large for {narrow}; choose another --dtype")
        return Piece([tensor.cpu() for tensor in stored], {"change": result.squared_norm, "rounding": lost})

    def _round(self, span, exact: Tensor) -> Tensor:
        """``exact`` as it is stored; a copy also where no rounding is needed, since its memory is used again."""
        dtype = self.outputs[span.name][0]
        start = span.start * span.width
        stored = rounded(exact, dtype, seed=self.seed, name=span.name, start=start)
        return stored.clone() if stored.data_ptr() == exact.data_ptr() else stored

    def _converted(self, task: Task, rows: Tensor) -> Tensor:
        span = task.spans[0]
        dtype = self.outputs[span.name][0]
        if rows.dtype is dtype:
            return rows
        return rounded(rows, dtype, seed=self.seed, name=span.name, start=span.start)

    def _refuse_nan(self, task: Task, parts: list[Tensor], result: Changed) -> None:
        """Say where a NaN or Inf comes from, if there is one: a sum may also be too large by itself."""
        for span, tensor in zip(task.spans, parts, strict=False):
            if not bool(torch.isfinite(tensor.float()).all()) and span.source is not None:
                place = self.base.tensors[span.source].file if self.base.folder else self.base.ref
                raise FormatError(f"{place}: tensor {span.source} holds NaN or Inf; the checkpoint is damaged")
        if task.target is not None and not bool(torch.isfinite(result.rows).all()):
            raise FormatError(f"{task.target.name}: the adapter's change holds NaN or Inf; the adapter is damaged")

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of this worker for new rows, used again: fresh pages would cost as much as the arithmetic."""
        held = getattr(self._memory, "held", None)
        if held is None or held.numel() < size or held.dtype is not dtype:
            self._memory.held = held = None
            self._memory.held = held = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size]


def _lost(stored: Tensor, exact: Tensor) -> float:
    """Squared norm of what rounding ``exact`` to ``stored`` changed."""
    return 0.0 if stored.dtype is exact.dtype else squared(stored.to(exact.dtype).sub_(exact))
