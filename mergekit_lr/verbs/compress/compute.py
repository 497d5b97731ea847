"""The arithmetic of compression: a batch of factor pairs of one shape to fewer directions each.

The SVD of B @ A comes from the factors, O((m + n) r^2) per module; no m x n matrix is formed. What is written are
balanced factors, B = U sqrt(S), A = sqrt(S) V^T, in the place of scaling * B @ A, so that the new scaling is 1.
Source: LoRA-Squeeze, arXiv 2602.10993, Post-Squeeze in its memory-efficient form.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from lrgpu.factored import squared_norm, svd_of_product, truncate_product
from torch import Tensor

from mergekit_lr.errors import FormatError
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.verbs.compress.plan import Task

Factors = tuple[Tensor, Tensor]


class Squeezed(NamedTuple):
    """One matrix. A (k, n), B (m, k): None where it was only measured. singular_values: of what A and B hold.
    squared_norm: of the whole delta; what the singular values leave of it is the squared error."""

    A: Tensor | None
    B: Tensor | None
    singular_values: list[float]
    squared_norm: float


def read(batch: Batch) -> list[Factors]:
    """The factors of a batch as they lie in the file, mapped."""
    return [node.work.delta for node in batch.nodes]


def compute(batch: Batch, factors: list[Factors], *, device: torch.device) -> list[Squeezed]:
    """Fewer directions for every node of a batch; all have one shape and one rule.

    Raises:
        FormatError: a factor holds NaN or Inf.
    """
    tasks: list[Task] = [node.work for node in batch.nodes]
    A, B = (torch.stack(parts).to(device) for parts in zip(*factors, strict=True))
    _refuse_nan(batch, A, B)
    rule = tasks[0].rule
    scale = torch.tensor([task.scaling for task in tasks], dtype=torch.float64, device=device)
    if rule is None:
        norms = squared_norm(B, A) * scale.square()
        return [Squeezed(None, None, [], float(norm)) for norm in norms]
    full = min(A.shape[1], A.shape[2], B.shape[1])
    if rule.count is not None:
        B, A, residual = truncate_product(B, A, rule.choose([], 1.0, full) or full)
        # Columns of a balanced B have the squared length of their singular value.
        values = B.double().square().sum(-2)
    else:
        U, S, Vh = svd_of_product(B, A)
        root = S.sqrt()
        B, A, values = U * root[:, None, :], root[:, :, None] * Vh, S.double()
        residual = torch.zeros(len(tasks), dtype=torch.float64)
    values = values * scale.abs()[:, None]
    norms = values.square().sum(-1) + (residual.to(device) * scale).square()
    A = A * scale.abs().sqrt().to(A.dtype)[:, None, None]
    B = B * (scale.sign() * scale.abs().sqrt()).to(B.dtype)[:, None, None]
    results = []
    for task, a, b, s, norm in zip(tasks, A, B, values.tolist(), norms.tolist(), strict=True):
        rank = len(s) if rule.count is not None else rule.choose(s, norm, full) or 0
        kept = (a[:rank].to(task.dtype).cpu(), b[:, :rank].to(task.dtype).cpu())
        results.append(Squeezed(kept[0], kept[1], s[:rank], norm))
    return results


def _refuse_nan(batch: Batch, A: Tensor, B: Tensor) -> None:
    for factor, which in ((A, "A"), (B, "B")):
        sums = factor.sum((1, 2), dtype=torch.float32).tolist()
        for node, total in zip(batch.nodes, sums, strict=True):
            if not math.isfinite(total):
                raise FormatError(f"{node.name}: factor {which} holds NaN or Inf; the adapter is damaged")
