"""The algebra of B @ A agrees with that of the dense product, without forming it (methods P1, P2, P4)."""

from __future__ import annotations

import pytest
import torch
from arrays import dense, double, normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lrgpu.factored import balance, inner, squared_norm, stack, svd_of_product, truncate_product


def orthogonal(rows: int, columns: int, seed: int) -> torch.Tensor:
    return torch.linalg.qr(normal(rows, columns, seed=seed, dtype=torch.float64))[0]


def hidden(condition: float) -> tuple[torch.Tensor, torch.Tensor]:
    """Factors of this condition each, of a product of condition 1: what one stretches the other undoes."""
    scale = condition ** -torch.linspace(0, 1, 12).double()
    Q, P, O = orthogonal(80, 12, 1), orthogonal(70, 12, 2), orthogonal(12, 12, 3)  # noqa: E741
    stretch = torch.linspace(2, 1, 12).double()
    return ((Q * scale) @ O).float(), (O.T @ (P * stretch / scale).T / condition).float()


B, A = normal(80, 12), normal(12, 70, seed=1)
TWICE = torch.cat([B[:, :6], B[:, :6]], -1)
CASES = {
    "plain": (B, A),
    "float64": (B.double(), A.double()),
    "bfloat16": (B.bfloat16(), A.bfloat16()),
    "float16 and float32": (B.half(), A),
    "columns of any scale": (B * 10.0 ** torch.linspace(-6, 6, 12), A / 10.0 ** torch.linspace(-6, 6, 12)[:, None]),
    "hidden, condition 30": hidden(30),
    "hidden, condition 800": hidden(800),
    "hidden, condition 1200": hidden(1200),
    "hidden, condition 1e5": hidden(1e5),
    "duplicate columns": (TWICE, A),
    "columns that cancel": (TWICE, torch.cat([A[:6], 1e-3 * A[6:] - A[:6]])),
    "a zero column": (B * (torch.arange(12) != 5), A),
    "zero": (0 * B, A),
    "zero in both": (0 * B, 0 * A),
    "more columns than rows": (normal(7, 30), normal(30, 9, seed=1)),
    "one side narrow": (normal(7, 10), normal(10, 90, seed=1)),
    "a row": (normal(1, 8), normal(8, 50, seed=1)),
    "single": (normal(1, 1), normal(1, 1, seed=1)),
}


@pytest.mark.parametrize("rank", [1, 5, None])
@pytest.mark.parametrize("name", CASES)
def test_svd_equals_the_dense_one(name, rank):
    B, A = CASES[name]
    product = B.double() @ A.double()
    values = torch.linalg.svdvals(product)
    result = svd_of_product(B, A, rank=rank)
    k = min(B.shape[1], *product.shape) if rank is None else min(rank, B.shape[1], *product.shape)
    eps = 1e-13 if B.dtype == torch.float64 else 1e-6
    scale = values[0].item()
    assert result.S.shape == (k,)
    assert result.S.dtype == (torch.float64 if B.dtype == torch.float64 else torch.float32)
    assert torch.allclose(double(result.S), values[:k], rtol=0, atol=eps * scale)
    error = (product - dense(result)).norm().item()
    assert error <= values[k:].norm().item() * (1 + 1e-6) + 5 * eps * scale
    kept = double(result.S) > 1e-5 * scale
    for vectors in (double(result.U)[:, kept], double(result.Vh)[kept].T):
        assert torch.allclose(vectors.T @ vectors, torch.eye(int(kept.sum())).double(), atol=100 * eps)


@pytest.mark.parametrize("rank", [1, 5, 12])
@pytest.mark.parametrize("name", CASES)
def test_truncation_loses_the_tail_and_says_so(name, rank):
    B, A = CASES[name]
    product = B.double() @ A.double()
    values = torch.linalg.svdvals(product)
    cut = truncate_product(B, A, rank)
    eps = 1e-13 if B.dtype == torch.float64 else 1e-6
    scale = values[0].item()
    tail = values[cut.B.shape[1] :].norm().item()
    assert float(cut.residual) == pytest.approx(tail, rel=1e-6, abs=eps * scale)
    assert (product - double(cut.B) @ double(cut.A)).norm().item() == pytest.approx(tail, rel=1e-6, abs=5 * eps * scale)
    gram_B, gram_A = double(cut.B).T @ double(cut.B), double(cut.A) @ double(cut.A).T
    assert torch.allclose(gram_B, gram_A, rtol=0, atol=100 * eps * scale)


@settings(max_examples=40, deadline=None)
@given(
    m=st.integers(1, 30),
    n=st.integers(1, 30),
    r=st.integers(1, 12),
    seed=st.integers(0, 1000),
    decades=st.floats(0, 6),
)
def test_p1_p2_in_float64(m, n, r, seed, decades):
    scale = 10.0 ** -torch.linspace(0, decades, r).double()
    B = normal(m, r, seed=seed, dtype=torch.float64) * scale
    A = normal(r, n, seed=seed + 1, dtype=torch.float64)
    product = B @ A
    values = torch.linalg.svdvals(product)
    result = svd_of_product(B, A)
    assert torch.allclose(result.S, values[: len(result.S)], rtol=0, atol=1e-12 * values[0].item())
    for k in range(1, r + 1):
        cut = truncate_product(B, A, k)
        lost = product - cut.B @ cut.A
        tail = values[k:]
        assert float(lost.norm()) == pytest.approx(tail.norm().item(), rel=1e-8, abs=1e-10 * values[0].item())
        if len(tail):
            spectral = torch.linalg.matrix_norm(lost, 2).item()
            assert spectral == pytest.approx(tail[0].item(), rel=1e-8, abs=1e-10 * values[0].item())


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 1000), condition=st.floats(1, 10))
def test_p4_the_gauge_does_not_matter(seed, condition):
    G = orthogonal(6, 6, seed) * torch.linspace(1, condition, 6).double() @ orthogonal(6, 6, seed + 1)
    B, A = normal(20, 6, seed=seed, dtype=torch.float64), normal(6, 25, seed=seed + 2, dtype=torch.float64)
    plain, turned = truncate_product(B, A, 3), truncate_product(B @ G, torch.linalg.solve(G, A), 3)
    assert torch.allclose(plain.B @ plain.A, turned.B @ turned.A, rtol=0, atol=1e-8 * float(B.norm() * A.norm()))


def test_batches_equal_singles_whatever_route_each_takes():
    names = ["plain", "duplicate columns", "zero", "hidden, condition 30", "hidden, condition 1e5", "plain"]
    Bs = torch.stack([CASES[name][0] for name in names]).reshape(2, 3, 80, 12)
    As = torch.stack([CASES[name][1] for name in names]).reshape(2, 3, 12, 70)
    together = svd_of_product(Bs, As, rank=4)
    residual = truncate_product(Bs, As, 4).residual
    assert together.U.shape == (2, 3, 80, 4)
    for i, name in enumerate(names):
        alone = svd_of_product(*CASES[name], rank=4)
        assert torch.allclose(dense(together)[i // 3, i % 3], dense(alone), rtol=1e-5, atol=1e-5)
        one = truncate_product(*CASES[name], 4).residual
        assert float(residual[i // 3, i % 3]) == pytest.approx(float(one), rel=1e-6, abs=1e-9)


def test_every_device(place):
    names = ["plain", "duplicate columns", "hidden, condition 1e5"]
    Bs = torch.stack([CASES[name][0] for name in names])
    As = torch.stack([CASES[name][1] for name in names])
    found = svd_of_product(place(Bs), place(As))
    assert torch.allclose(dense(found), Bs.double() @ As.double(), rtol=0, atol=1e-4)
    norms = double(squared_norm(place(Bs), place(As)))
    assert torch.allclose(norms, (Bs.double() @ As.double()).square().sum((1, 2)), rtol=1e-9)


def test_norms_and_inner_products():
    B2, A2 = normal(2, 80, 5, seed=2), normal(2, 5, 70, seed=3)
    B1, A1 = torch.stack([B, -B]), torch.stack([A, A])
    product, other = B1.double() @ A1.double(), B2.double() @ A2.double()
    assert torch.allclose(squared_norm(B1, A1), product.square().sum((1, 2)))
    assert torch.allclose(inner(B1, A1, B2, A2), (product * other).sum((1, 2)), atol=1e-9)


def test_stacked_factors_add_up_and_balance_keeps_the_product():
    B2, A2 = normal(80, 5, seed=2), normal(5, 70, seed=3)
    Bs, As = stack([(B, A), (B2, A2)])
    assert torch.allclose(Bs @ As, B @ A + B2 @ A2, atol=1e-4)
    balanced_B, balanced_A = balance(Bs, As)
    assert torch.allclose(balanced_B @ balanced_A, Bs @ As, atol=1e-4)
    assert torch.allclose(balanced_B.T @ balanced_B, balanced_A @ balanced_A.T, atol=1e-3)


@pytest.mark.parametrize("lead", [(), (3,), (0,)])
def test_rank_zero_and_empty_batches(lead):
    cut = truncate_product(torch.zeros(*lead, 20, 0), torch.zeros(*lead, 0, 30), 4)
    assert cut.B.shape == (*lead, 20, 0)
    assert cut.A.shape == (*lead, 0, 30)
    assert cut.residual.shape == lead
    assert not squared_norm(torch.zeros(*lead, 20, 0), torch.zeros(*lead, 0, 30)).any()
    nothing = truncate_product(normal(*lead, 20, 3), normal(*lead, 3, 30), 0)
    assert nothing.B.shape == (*lead, 20, 0)
    assert torch.allclose(nothing.residual**2, squared_norm(normal(*lead, 20, 3), normal(*lead, 3, 30)))


def test_the_same_bytes_every_time():
    first, again = svd_of_product(B, A), svd_of_product(B.clone(), A.clone())
    assert all(torch.equal(x, y) for x, y in zip(first, again, strict=True))


def test_factors_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match=r"\(80, 12\).*\(11, 70\)"):
        svd_of_product(B, A[:11])
    with pytest.raises(TypeError, match="ndarray"):
        svd_of_product(B.numpy(), A.numpy())


def test_columns_of_very_different_lengths_give_no_nan():
    """Small columns of B meet small rows of A: singular values beyond the reach of a Gram, which may come out as 0."""
    lengths = torch.tensor([1.0, 1.0, 1.0, 1e-5, 1e-5, 1e-6, 1e-7])
    for seed in range(20):
        B, A = normal(24, 7, seed=seed) * lengths, normal(7, 40, seed=seed + 100) * lengths[:, None]
        U, S, Vh = svd_of_product(B, A)
        assert bool(torch.isfinite(U).all() & torch.isfinite(S).all() & torch.isfinite(Vh).all()), seed
        assert torch.linalg.vector_norm((U * S) @ Vh - B @ A) < 1e-5 * torch.linalg.vector_norm(B @ A)
