"""The arithmetic of extraction: from the two sides of a batch to factors and figures. No file is written here."""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
from lrgpu.elementwise import delta
from lrgpu.rank import RankRule, noise_floor
from lrgpu.truncated import truncated_svd, truncated_svd_by_rule
from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import Sides, read_pair, refuse_nan
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.safetensors import prefault
from mergekit_lr.graph.node import Node
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.verbs.extract.plan import Task


class Finished(NamedTuple):
    """tensors: ``A`` (r, d_in) and ``Bt`` (r, d_out), where the delta was decomposed. figures: what JSON can hold."""

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


class _Delta(NamedTuple):
    """One delta of a batch, formed in ``matrix``."""

    node: Node
    sides: Sides
    matrix: Tensor
    squared_norm: float


@dataclass
class Extraction:
    """The three stages of one run over a base and its fine-tune.

    dtype: of the factors. seed: with the name of a matrix it determines the random sketch of that matrix.
    """

    base: Checkpoint
    finetuned: Checkpoint
    device: torch.device
    dtype: torch.dtype
    seed: int
    _buffers: threading.local = field(default_factory=threading.local)

    def read(self, batch: Batch) -> list[Sides]:
        """Map both sides of every node, and have their pages brought in."""
        sides = []
        for node in batch.nodes:
            task: Task = node.work
            pair = read_pair(task.pair, task.index, self.base, self.finetuned)
            for tensor in pair:
                prefault(tensor)
            sides.append(pair)
        return sides

    def compute(self, batch: Batch, sides: list[Sides]) -> list[Finished]:
        """Delta, norm and factors of every node of the batch.

        Raises:
            FormatError: a delta holds NaN or Inf.
        """
        started = time.perf_counter()
        rows, columns = batch.nodes[0].work.pair.base.matrix_shape
        wide = torch.float64 in (sides[0].base.dtype, sides[0].finetuned.dtype)
        stack = self._buffer(len(sides) * rows * columns, torch.float64 if wide else torch.float32)
        stack = stack.view(len(sides), rows, columns)
        work = [
            _Delta(node, side, matrix, self._form(node.work, side, matrix))
            for node, side, matrix in zip(batch.nodes, sides, stack, strict=True)
        ]
        changed = [item for item in work if item.squared_norm > 0]
        factors: dict[str, Finished] = {}
        rule = batch.nodes[0].work.rule
        if rule is not None and changed:
            # Batches are one rule throughout; matrices whose delta is zero drop out of the stack.
            whole = stack if len(changed) == len(work) else torch.stack([item.matrix for item in changed])
            factors = self._decompose(rule, batch.nodes[0].work.noise, whole, changed)
        seconds = (time.perf_counter() - started) / len(work)
        nothing = Finished({}, {})
        return [
            Finished(done.tensors, {"squared_norm": item.squared_norm, "seconds": seconds, **done.figures})
            for item in work
            for done in [factors.get(item.node.name, nothing)]
        ]

    def _form(self, task: Task, side: Sides, out: Tensor) -> float:
        """Form one delta in ``out`` and return its squared norm, 0 where the two sides differ by rounding only."""
        new, old = (_as_matrix(t.to(self.device, non_blocking=True), task.pair.base.kind, out.shape) for t in side)
        if new.dtype != old.dtype and torch.equal(old.to(new.dtype), new):
            return 0.0
        norm = delta(new, old, out=out).squared_norm
        if not math.isfinite(norm):
            refuse_nan(side, task.pair, self.base, self.finetuned)
        return norm

    def _decompose(
        self, rule: RankRule, noise: torch.dtype | None, stack: Tensor, items: list[_Delta]
    ) -> dict[str, Finished]:
        """Factors and figures by node name for each matrix of ``stack`` (b, m, n)."""
        seeds = [seed_of(self.seed, item.node.name) for item in items]
        if rule.count is not None:
            rank = rule.choose([], math.inf, min(stack.shape[-2:])) or 0
            norms = torch.tensor([item.squared_norm for item in items], dtype=torch.float64, device=self.device)
            svd = truncated_svd(stack, rank, squared_norm=norms, seeds=seeds)
            each = zip(svd.U, svd.S, svd.Vh, svd.excess.tolist(), strict=True)
            return {
                item.node.name: self._factors(u, s, vh, excess, svd.passes)
                for item, (u, s, vh, excess) in zip(items, each, strict=True)
            }
        made = {}
        for item, matrix, seed in zip(items, stack, seeds, strict=True):
            own = rule if noise is None else _above_noise(rule, noise, item.sides.base, matrix.shape)
            svd = truncated_svd_by_rule(matrix, own, squared_norm=item.squared_norm, seeds=seed)
            made[item.node.name] = self._factors(svd.U, svd.S, svd.Vh, float(svd.excess), svd.passes)
        return made

    def _factors(self, u: Tensor, s: Tensor, vh: Tensor, excess: float, passes: int) -> Finished:
        """Balanced factors, B = U sqrt(S) and A = sqrt(S) V^T: equal norms, the least rounding in half precision."""
        root = s.sqrt()[:, None]
        tensors = {"A": (root * vh).to(self.dtype).cpu(), "Bt": (root * u.mT).to(self.dtype).cpu()}
        values = [float(value) for value in s.double()]
        return Finished(tensors, {"singular_values": values, "excess": excess, "passes": int(passes)})

    def _buffer(self, size: int, dtype: torch.dtype) -> Tensor:
        """Memory of this worker for deltas, reused: faulting in fresh pages would cost as much as the subtraction."""
        held = getattr(self._buffers, "memory", None)
        if held is None or held.numel() < size or held.dtype is not dtype:
            self._buffers.memory = held = None
            self._buffers.memory = held = torch.empty(size, dtype=dtype, device=self.device)
        return held[:size]


def seed_of(seed: int, name: str) -> int:
    """A seed for the sketch of ``name``: the same whatever else is computed, in any order, by any worker."""
    import hashlib

    return int.from_bytes(hashlib.sha256(f"{seed}:{name}".encode()).digest()[:7], "little")


def _as_matrix(tensor: Tensor, kind: Kind, shape: torch.Size) -> Tensor:
    """A weight in its own layout as the matrix (d_out, d_in) of a linear layer, as a view."""
    return tensor.mT if kind.turned else tensor.reshape(shape)


def _above_noise(rule: RankRule, noise: torch.dtype, base: Tensor, shape: torch.Size) -> RankRule:
    squared = sum(float(torch.linalg.vector_norm(part.float()) ** 2) for part in base.reshape(-1).split(1 << 22))
    rms = math.sqrt(squared / max(base.numel(), 1))
    floor = noise_floor(rms, (shape[0], shape[1]), noise)
    return RankRule(floor=floor, multiple_of=rule.multiple_of, max_rank=rule.max_rank)
