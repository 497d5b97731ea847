"""The graded route of the polar factor against a float64 SVD, on spectra that are hard for eigenproblems in float32."""

from __future__ import annotations

import pytest
import torch
from lrgpu import polar as polar_module
from lrgpu.polar import graded, polar
from torch import Tensor

SIDE = 256
EPS = torch.finfo(torch.float32).eps


def given(kind: str, n: int = SIDE) -> Tensor:
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    U, V = torch.linalg.qr(normal(n, n)).Q, torch.linalg.qr(normal(n, n)).Q
    i = torch.arange(1, n + 1)
    made = {
        "normal": lambda: normal(n, n),
        "tall": lambda: normal(2 * n, n),
        "wide": lambda: normal(n, 2 * n),
        "small numbers": lambda: 1e-25 * normal(n, n),
        "i^-0.5": lambda: (U * i**-0.5) @ V.T,
        "i^-1": lambda: (U * i**-1.0) @ V.T,
        "condition 1e4": lambda: (U * torch.logspace(0, -4, n)) @ V.T,
        "steps": lambda: (U * 10.0 ** -(i // 70)) @ V.T,
        "low rank": lambda: normal(n, n // 4) @ normal(n // 4, n),
        "low rank and noise": lambda: normal(n, 8) @ normal(8, n) + 0.03 * normal(n, n),
        "equal columns": lambda: normal(n, n)[:, torch.arange(n) // 2],
        "subspaces side by side": lambda: torch.cat([torch.linalg.qr(normal(n, n // 8)).Q for _ in range(8)], 1),
        "orthogonal": lambda: U,
        "one column": lambda: torch.outer(normal(n), torch.eye(n)[0]),
    }
    return made[kind]()


KINDS = (
    "normal", "tall", "wide", "small numbers", "i^-0.5", "i^-1", "condition 1e4", "steps", "low rank",
    "low rank and noise", "equal columns", "subspaces side by side", "orthogonal", "one column",
)  # fmt: skip


def exact(M: Tensor) -> tuple[Tensor, Tensor, int]:
    """P on the numerical range, the singular values and the rank."""
    U, S, Vh = torch.linalg.svd(M.double(), full_matrices=False)
    counts = S > max(M.shape) * EPS * S[0]
    return (U * counts) @ Vh, S, int(counts.sum())


@pytest.mark.parametrize("kind", KINDS)
def test_graded_route(kind: str):
    M = given(kind)
    P, S, rank = exact(M)
    tall = M if M.shape[0] >= M.shape[1] else M.T
    assert graded(tall, max(M.shape) * EPS)[0] is not None, "the route was not taken"
    found = polar(M)
    assert int(found.rank) == rank
    assert float((found.P.double() - P).norm() / P.norm()) < 2e-4
    torch.testing.assert_close(found.nuclear_norm, S.sum(), rtol=2e-5, atol=0)


def test_zero():
    found = polar(torch.zeros(SIDE, SIDE))
    assert not found.P.any()
    assert int(found.rank) == 0


def test_floor():
    """What the caller takes for rounding, on every route."""
    for M in (given("condition 1e4"), given("condition 1e4", 64), given("condition 1e4", 64).double()):
        S = torch.linalg.svdvals(M.double())
        assert int(polar(M, floor=0.0101).rank) == int((S > 0.0101 * S[0]).sum())
        assert int(polar(M, floor=1e-6).rank) == len(S)


def test_another_route_where_the_first_order_is_not_enough(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(polar_module, "_SECOND_ORDER", 0.0)
    M = given("i^-1")
    assert graded(M, SIDE * EPS)[0] is None
    P, _, rank = exact(M)
    found = polar(M)
    assert int(found.rank) == rank
    torch.testing.assert_close(found.P.double(), P, rtol=0, atol=1e-6)
