"""Properties of LowRank over ranks, shapes, scalings, dtypes and batches: what is said to be exact is exact."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import MismatchError, UsageError

SIDES = st.integers(1, 9)
SCALINGS = st.floats(-4, 4, allow_subnormal=False).map(lambda x: round(x, 3))
DTYPES = st.sampled_from([torch.float64, torch.float32, torch.bfloat16, torch.float16])


@st.composite
def deltas(draw, dtype=None, batch=None, shape=None, least_rank=0):
    """A delta of any shape and rank, r = 0 and r > d among them, with or without experts."""
    lead = draw(st.sampled_from([(), (3,), (2, 2)])) if batch is None else batch
    d_out, d_in = shape or (draw(SIDES), draw(SIDES))
    rank = draw(st.integers(least_rank, 12))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    kind = dtype or draw(DTYPES)
    A = torch.randn(*lead, rank, d_in, generator=generator, dtype=torch.float64).to(kind)
    B = torch.randn(*lead, d_out, rank, generator=generator, dtype=torch.float64).to(kind)
    return LowRank(A, B, draw(SCALINGS))


def exact(delta: LowRank) -> Tensor:
    """The delta in float64, as written down."""
    return delta.scaling * (delta.B.double() @ delta.A.double())


def tolerance(delta: LowRank) -> float:
    return 1e-10 if delta.compute_dtype == torch.float64 else 3e-5


def assert_same(got: Tensor, wanted: Tensor, error: float) -> None:
    size = max(float(wanted.abs().max()) if wanted.numel() else 0.0, 1e-3)
    torch.testing.assert_close(got.double(), wanted, rtol=0, atol=error * size * 10)


@given(deltas())
def test_svd_is_that_of_the_dense_matrix(delta: LowRank):
    """P1: values, orthonormality and product."""
    svd, dense = delta.svd(), exact(delta)
    error, k = tolerance(delta), min(delta.rank, *delta.shape[-2:])
    assert svd.S.shape[-1] == k
    assert_same(svd.S, torch.linalg.svdvals(dense)[..., :k], error)
    assert_same((svd.U * svd.S.unsqueeze(-2)) @ svd.Vh, dense, error)
    for basis in (svd.U.mT @ svd.U, svd.Vh @ svd.Vh.mT):
        kept = (svd.S > svd.S[..., :1] * 1e-4).double() if k else svd.S.double()
        mask = kept.unsqueeze(-1) * kept.unsqueeze(-2)
        assert_same(basis.double() * mask, torch.eye(k, dtype=torch.float64) * mask, 100 * error)


@given(deltas(), st.integers(0, 14))
def test_truncation_leaves_out_exactly_the_tail(delta: LowRank, rank: int):
    """P2: error^2 = tail energy, spectral error = the next singular value, lossless from the true rank on, balanced."""
    cut, dense = delta.truncate(rank), exact(delta)
    error, values = tolerance(delta), torch.linalg.svdvals(dense)
    left = dense - exact(cut.delta)
    assert cut.delta.rank == min(rank, delta.rank, *delta.shape[-2:])
    assert_same(cut.residual, values[..., rank:].square().sum(-1).sqrt(), error * 10)
    assert_same(left.flatten(-2).norm(dim=-1), cut.residual.double(), error * 100)
    if rank < values.shape[-1]:
        assert_same(torch.linalg.svdvals(left)[..., 0], values[..., rank], error * 100)
    assert_same(cut.delta.B.mT @ cut.delta.B, (cut.delta.A @ cut.delta.A.mT).double(), error * 10)


@given(deltas(dtype=torch.float64, batch=()), st.integers(0, 2**32))
def test_nothing_depends_on_the_gauge(delta: LowRank, seed: int):
    """P4: (B G, G^-1 A) is the same delta to every question."""
    r = delta.rank
    generator = torch.Generator().manual_seed(seed)
    Q = torch.linalg.qr(torch.randn(r, r, generator=generator, dtype=torch.float64)).Q
    stretch = torch.linspace(1, 8, r, dtype=torch.float64)
    other = LowRank(Q.mT @ delta.A / 1.0, delta.B @ Q, delta.scaling)
    other = LowRank(other.A / stretch[:, None], other.B * stretch, other.scaling)
    for ask in (LowRank.dense, LowRank.norm, lambda d: d.svd().S, lambda d: exact(d.truncate(2).delta)):
        assert_same(ask(other), ask(delta).double(), 1e-8)


@given(deltas(dtype=torch.float64), st.sampled_from([0.25, 0.5, 2.0, 8.0]))
def test_nothing_depends_on_the_scale_convention(delta: LowRank, factor: float):
    """P8: alpha against factors."""
    other = LowRank(delta.A, delta.B * factor, delta.scaling / factor)
    for ask in (LowRank.dense, LowRank.norm, lambda d: d.svd().S, lambda d: d.folded().B, lambda d: d.inner(delta)):
        assert_same(ask(other), ask(delta).double(), 1e-12)


@given(st.data(), DTYPES, SCALINGS)
def test_sums_and_multiples_are_exact(data, dtype: torch.dtype, factor: float):
    """+, - and * act on the matrices; ranks add up; norm and inner product are the matrices' own."""
    one = data.draw(deltas(dtype=dtype))
    two = data.draw(deltas(dtype=dtype, batch=one.shape[:-2], shape=one.shape[-2:]))
    error = tolerance(one)
    total = one + two * factor
    assert total.rank == one.rank + two.rank
    assert_same(total.dense(), exact(one) + factor * exact(two), error)
    assert_same((one - two).dense(), exact(one) - exact(two), error)
    assert_same((-one).dense(), -exact(one), error)
    assert_same(one.norm(), exact(one).flatten(-2).norm(dim=-1), 1e-7)
    assert_same(one.inner(two), (exact(one) * exact(two)).sum((-1, -2)), 1e-7)


@given(deltas())
def test_balancing_changes_nothing_else(delta: LowRank):
    balanced = delta.balanced()
    assert balanced.scaling == 1
    assert_same(balanced.dense(), exact(delta), tolerance(delta))


@given(deltas(dtype=torch.float64, batch=(), least_rank=1))
def test_compress_finds_the_rank(delta: LowRank):
    """A delta added to itself has twice the columns and the same rank; so has one with zero columns."""
    rank = int(torch.linalg.matrix_rank(exact(delta)))
    doubled = delta + delta
    assert doubled.compress().rank == rank
    assert_same(doubled.compress().dense(), 2 * exact(delta), 1e-10)
    padded = LowRank(torch.cat((delta.A, delta.A)), torch.cat((delta.B, 0 * delta.B), dim=1), delta.scaling)
    assert padded.compress().rank == rank


def test_compress_keeps_the_largest_rank_of_a_stack():
    A, B = torch.randn(2, 3, 8), torch.randn(2, 6, 3)
    B[1, :, 1:] = 0
    assert LowRank(A, B).compress().rank == 3
    assert LowRank(A, 0 * B).compress().rank == 0


def test_rank_zero_is_a_delta():
    nothing = LowRank(torch.empty(0, 5), torch.empty(4, 0))
    assert torch.equal(nothing.dense(), torch.zeros(4, 5))
    assert float(nothing.norm()) == 0
    something = LowRank(torch.randn(2, 5), torch.randn(4, 2), 0.5)
    assert torch.equal((something + nothing).dense(), something.dense())
    assert (nothing + nothing).truncate(3).delta.rank == nothing.compress().rank == 0


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(MismatchError, match=r"A has shape \[2, 5\] and B \[4, 3\]"):
        LowRank(torch.randn(2, 5), torch.randn(4, 3))
    with pytest.raises(MismatchError, match=r"shape \[4, 6\] to one of shape \[4, 5\]"):
        LowRank(torch.randn(2, 5), torch.randn(4, 2)) + LowRank(torch.randn(2, 6), torch.randn(4, 2))
    with pytest.raises(UsageError, match="negative"):
        LowRank(torch.randn(2, 5), torch.randn(4, 2)).truncate(-1)
