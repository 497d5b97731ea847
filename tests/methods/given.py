"""What properties are tested on: deltas and adapters with known defects, from a seed, in float64."""

from __future__ import annotations

import torch
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank

KINDS = ("plain", "ill-conditioned", "rank-deficient", "duplicate", "opposite", "zero task", "row", "column")


def deltas(seed: int, kind: str = "plain", tasks: int = 3, shape: tuple[int, int] = (9, 7)) -> list[Tensor]:
    """T dense deltas."""
    generator = torch.Generator().manual_seed(seed)
    m, n = {"row": (1, shape[1]), "column": (shape[0], 1)}.get(kind, shape)

    def draw(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    given = [draw(m, n) for _ in range(tasks)]
    if kind == "ill-conditioned":
        given = [matrix * torch.logspace(0, -6, n, dtype=torch.float64) for matrix in given]
    elif kind == "rank-deficient":
        given = [draw(m, 2) @ draw(2, n) for _ in range(tasks)]
    elif kind == "duplicate":
        given = [given[0].clone() for _ in range(tasks)]
    elif kind == "opposite":
        given[1] = -given[0]
    elif kind == "zero task":
        given[1] = torch.zeros_like(given[1])
    return given


def adapters(
    seed: int, kind: str = "plain", tasks: int = 3, shape: tuple[int, int] = (12, 10), rank: int = 2
) -> list[LowRank]:
    """T adapters, of unequal scalings."""
    generator = torch.Generator().manual_seed(seed)
    m, n = {"row": (1, shape[1]), "column": (shape[0], 1)}.get(kind, shape)
    given = []
    for t in range(tasks):
        A = torch.randn(rank, n, generator=generator, dtype=torch.float64)
        B = torch.randn(m, rank, generator=generator, dtype=torch.float64)
        if kind == "ill-conditioned":
            A = A * torch.logspace(0, -6, rank, dtype=torch.float64)[:, None]
        elif kind == "rank-deficient":
            A[-1] = A[0]
        elif kind == "zero task" and t == 1:
            B = torch.zeros_like(B)
        given.append(LowRank(A, B, 0.5 + 0.25 * t))
    if kind == "duplicate":
        given = [given[0]] * tasks
    elif kind == "opposite":
        given[1] = -given[0]
    return given


def orthogonal(seed: int, size: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.linalg.qr(torch.randn(size, size, generator=generator, dtype=torch.float64)).Q


def dense(delta: Tensor | LowRank) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


def close(left: Tensor | LowRank, right: Tensor | LowRank, tolerance: float) -> None:
    """Equal to ``tolerance`` of the larger's largest element."""
    left, right = dense(left), dense(right)
    scale = max(float(left.abs().max()), float(right.abs().max()), 1e-300)
    torch.testing.assert_close(left, right, rtol=0, atol=tolerance * scale)


seeds = st.integers(0, 10_000)
kinds = st.sampled_from(KINDS)
