"""The truncated SVD is within 1 % of the best for every spectrum, and says truly how good it is."""

from __future__ import annotations

import math

import pytest
import torch
from arrays import dense, double, low_rank_and_noise, merged_in_bf16, normal, with_spectrum
from hypothesis import given, settings
from hypothesis import strategies as st
from lrgpu.rank import RankRule
from lrgpu.truncated import truncated_svd, truncated_svd_by_rule

I = torch.arange(1, 401).double()  # noqa: E741
ONE_ENTRY = torch.zeros(300, 260)
ONE_ENTRY[3, 7] = 2.0

SPECTRA = {
    "i^-1": with_spectrum(I**-1, 400, 500),
    "i^-0.5": with_spectrum(I**-0.5, 500, 400),
    "i^-3": with_spectrum(I**-3, 400, 400),
    "exponential": with_spectrum(0.9**I, 400, 400),
    "low rank and flat noise": low_rank_and_noise(400, 500, 16, 0.5),
    "low rank and faint noise": low_rank_and_noise(500, 400, 16, 1e-3),
    "lora merged in bf16": merged_in_bf16(400, 400, 8),
    "gaussian": normal(400, 300),
    "flat": with_spectrum(torch.ones(300), 300, 300),
    "one spike": with_spectrum(torch.cat([torch.ones(1), torch.full((399,), 1e-2)]), 400, 400),
    "step at 40": with_spectrum(torch.cat([torch.ones(40), torch.full((260,), 1e-2)]), 300, 300),
    "plateau": with_spectrum(1 + 0.1 * torch.linspace(1, 0, 500) - 0.5 * (torch.arange(500) > 160), 500, 500),
    "repeated 40 times": torch.block_diag(torch.eye(40), 1e-2 * normal(300, 300) / 35),
    "exact low rank": normal(400, 6) @ normal(6, 300, seed=1),
    "rank one": torch.outer(normal(300), normal(400, seed=1)),
    "one entry": ONE_ENTRY,
    "zero": torch.zeros(200, 300),
    "tiny scale": 1e-25 * normal(300, 300),
    "large scale": 1e15 * normal(300, 300),
    "tall": normal(3000, 40),
    "very wide": normal(200, 3000),
    "row": normal(1, 700),
    "column": normal(700, 1),
    "single": normal(1, 1),
    "small": normal(6, 5),
}


def check(matrix: torch.Tensor, result, rank: int, tolerance: float = 0.01) -> None:
    values = torch.linalg.svdvals(matrix.double())
    norm, best = values.norm().item(), values[rank:].norm().item()
    error = (matrix.double() - dense(result)).norm().item()
    k = min(rank, *matrix.shape)
    assert result.S.shape == (k,)
    assert error <= (1 + tolerance) * best + 1e-6 * norm
    assert float(result.residual) == pytest.approx(error, rel=1e-3, abs=1e-6 * norm)
    assert math.sqrt(float(result.squared_norm)) == pytest.approx(norm, rel=1e-6)
    S = double(result.S)
    assert (S.diff() <= 1e-7 * norm).all()
    assert (S >= 0).all()
    assert torch.allclose(S, values[:k], rtol=0.1, atol=1e-6 * norm)
    kept = S > 1e-3 * norm
    for vectors in (double(result.U)[:, kept], double(result.Vh)[kept].T):
        assert torch.allclose(vectors.T @ vectors, torch.eye(int(kept.sum())).double(), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 8, 64])
@pytest.mark.parametrize("name", SPECTRA)
def test_within_one_percent_of_the_best(name, rank):
    check(SPECTRA[name], truncated_svd(SPECTRA[name], rank), rank)


@pytest.mark.parametrize("name", ["i^-0.5", "low rank and flat noise"])
def test_a_tighter_tolerance_is_kept(name):
    check(SPECTRA[name], truncated_svd(SPECTRA[name], 32, tolerance=1e-4), 32, tolerance=1e-4)


def test_every_device(place):
    matrix = SPECTRA["lora merged in bf16"]
    batch = torch.stack([matrix, SPECTRA["exponential"], 0 * matrix])
    result = truncated_svd(place(batch), 16)
    assert double(result.S)[2].count_nonzero() == 0
    for i in range(2):
        one = type(result)(*(x if isinstance(x, int) else x[i] for x in result))
        check(batch[i], one, 16)


@settings(max_examples=25, deadline=None)
@given(
    power=st.floats(0.05, 3),
    cut=st.integers(1, 200),
    floor=st.sampled_from([1e-4, 1e-2, 0.3]),
    rank=st.sampled_from([1, 5, 16, 40]),
    seed=st.integers(0, 1000),
)
def test_any_power_law_on_any_floor(power, cut, floor, rank, seed):
    values = torch.arange(1, 201).double() ** -power
    values[cut:] *= floor
    matrix = with_spectrum(values, 220, 200, seed=seed)
    check(matrix, truncated_svd(matrix, rank, seeds=seed), rank)


@pytest.mark.parametrize("shape", [(300, 200), (200, 300), (1, 50), (50, 1), (5, 5)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_full_rank_gives_the_matrix_back(shape, dtype):
    matrix = normal(*shape, dtype=dtype)
    result = truncated_svd(matrix, 10_000)
    eps = torch.finfo(dtype).eps
    assert (dense(result) - matrix.double()).norm() <= 64 * eps * matrix.double().norm()
    assert result.S.dtype == result.U.dtype == result.Vh.dtype == dtype
    assert float(result.residual) == 0.0


def test_rank_zero():
    matrix = normal(30, 20)
    result = truncated_svd(matrix, 0)
    assert (result.U.shape, result.S.shape, result.Vh.shape) == ((30, 0), (0,), (0, 20))
    assert float(result.residual) == pytest.approx(matrix.norm().item(), rel=1e-6)


@pytest.mark.parametrize("rank", [8, 90])
def test_a_batch_equals_its_matrices(rank):
    batch = torch.stack([SPECTRA["lora merged in bf16"], SPECTRA["i^-3"], SPECTRA["exponential"]])
    batch = torch.stack([batch, batch.flip(0)])
    seeds = [3, 1, 4, 1, 5, 9]
    together = truncated_svd(batch, rank, seeds=seeds)
    assert together.U.shape == (2, 3, 400, rank)
    assert together.residual.shape == together.excess.shape == (2, 3)
    for i, seed in enumerate(seeds):
        alone = truncated_svd(batch[i // 3, i % 3], rank, seeds=seed)
        assert torch.allclose(together.S[i // 3, i % 3], alone.S, rtol=1e-5, atol=1e-7)
        assert float(together.residual[i // 3, i % 3]) == pytest.approx(float(alone.residual), rel=1e-4)


def test_matrices_of_a_batch_in_step_stop_each_for_itself(monkeypatch):
    """A GPU runs a batch in step; here the same is done on the CPU and compared with one by one."""
    from dataclasses import replace

    from lrgpu import backend

    batch = torch.stack([SPECTRA["i^-3"], SPECTRA["lora merged in bf16"], SPECTRA["exponential"]])
    alone = truncated_svd(batch, 24, seeds=[1, 2, 3])
    monkeypatch.setattr(backend, "_TORCH", replace(backend.of(batch), on_cpu=lambda x: False))
    together = truncated_svd(batch, 24, seeds=[1, 2, 3])
    assert torch.allclose(together.S, alone.S, rtol=1e-4, atol=1e-7)
    assert torch.allclose(together.residual, alone.residual, rtol=1e-3)
    assert torch.allclose(together.excess, alone.excess, rtol=0.1, atol=1e-4)


def test_the_same_seed_gives_the_same_bytes_on_any_number_of_threads():
    matrix = SPECTRA["low rank and flat noise"]
    first, again = truncated_svd(matrix, 20, seeds=7), truncated_svd(matrix, 20, seeds=7)
    assert all(torch.equal(getattr(first, x), getattr(again, x)) for x in ("U", "S", "Vh", "residual"))
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(3 - min(threads, 2))
        other = truncated_svd(matrix, 20, seeds=7)
    finally:
        torch.set_num_threads(threads)
    assert torch.allclose(dense(other), dense(first), atol=1e-5 * matrix.norm().item())
    assert not torch.equal(truncated_svd(matrix, 20, seeds=8).U, first.U)


def test_a_known_norm_is_taken_and_the_matrix_is_left_alone():
    matrix = SPECTRA["i^-1"].clone()
    before = matrix.clone()
    result = truncated_svd(matrix, 16, squared_norm=(matrix.double() ** 2).sum().item())
    assert torch.equal(matrix, before)
    check(matrix, result, 16)
    check(matrix.mT, truncated_svd(matrix.mT, 16), 16)


@pytest.mark.parametrize("name", ["i^-1", "i^-0.5", "lora merged in bf16", "step at 40", "exact low rank", "small"])
@pytest.mark.parametrize(
    "rule",
    [
        RankRule(energy=0.5),
        RankRule(energy=0.9),
        RankRule(error=0.2),
        RankRule(error=0.0),
        RankRule(energy=1.0, max_rank=12),
        RankRule(floor=0.05),
        RankRule(count=10, multiple_of=8),
    ],
    ids=repr,
)
def test_a_rule_is_met_with_hardly_more_rank_than_the_exact_values_need(name, rule):
    matrix = SPECTRA[name]
    values = torch.linalg.svdvals(matrix.double())
    norm = values.norm().item()
    result = truncated_svd_by_rule(matrix, rule)
    rank, needed = result.S.shape[-1], rule.choose(values, norm**2, len(values))
    assert needed is not None
    error = (matrix.double() - dense(result)).norm().item()
    assert needed - 1 - needed // 50 <= rank <= needed + 1 + needed // 20
    assert float(result.residual) == pytest.approx(error, rel=1e-3, abs=1e-6 * norm)
    if rule.max_rank is None:
        allowed = math.sqrt(1 - rule.energy) if rule.energy else rule.error if rule.error is not None else 1.0
        assert error <= (allowed + 1e-5) * norm
    assert error <= 1.01 * values[rank:].norm().item() + 1e-5 * norm


def test_rules_on_a_batch_and_on_zero():
    batch = torch.stack([SPECTRA["exponential"], torch.zeros(400, 400), SPECTRA["i^-3"]])
    result = truncated_svd_by_rule(batch, RankRule(energy=0.99), max_rank=20)
    counts = (result.S > 0).sum(-1).tolist()
    assert counts[1] == 0
    assert result.S.shape[-1] == max(counts)
    errors = (batch.double() - dense(result)).norm(dim=(1, 2))
    assert torch.allclose(errors, result.residual, rtol=1e-4)
    assert truncated_svd_by_rule(torch.zeros(300, 300), RankRule(energy=0.9)).S.shape == (0,)


def test_what_does_not_fit_is_refused():
    matrix = normal(20, 30)
    with pytest.raises(TypeError, match="float16"):
        truncated_svd(matrix.half(), 4)
    with pytest.raises(ValueError, match="two axes"):
        truncated_svd(matrix[0], 4)
    with pytest.raises(ValueError, match="rank"):
        truncated_svd(matrix, -1)
    with pytest.raises(ValueError, match="2 seeds for 1"):
        truncated_svd(matrix, 4, seeds=[1, 2])
    matrix[3, 4] = math.nan
    with pytest.raises(ValueError, match="NaN"):
        truncated_svd(matrix, 4)


@pytest.mark.parametrize("shape", [(300, 260), (260, 300), (256, 256)])
@pytest.mark.parametrize("spectrum", ["normal", "power", "bfloat16 noise"])
def test_large_rank_from_a_gram(shape: tuple[int, int], spectrum: str):
    """A good part of all triplets, float32: as close to the best as asked, and the report true."""
    rows, columns = shape
    D = normal(rows, columns)
    if spectrum == "power":
        D = with_spectrum(torch.arange(1, 257) ** -0.7, rows, columns)
    elif spectrum == "bfloat16 noise":
        D = 1e-2 * normal(rows, 8) @ normal(8, columns, seed=1)
        D = (D + normal(rows, columns, seed=2)).bfloat16().float() - normal(rows, columns, seed=2).bfloat16().float()
    D, rank = D.float(), 120
    found = truncated_svd(D, rank, tolerance=1e-3)
    assert found.passes == 2, "the route was not taken"
    exact = torch.linalg.svdvals(D.double())
    least = float(exact[rank:].norm())
    residual = float((D.double() - (found.U.double() * found.S) @ found.Vh.double()).norm())
    assert residual < 1.001 * least
    assert float(found.residual) == pytest.approx(residual, rel=1e-4)
    for vectors in (found.U.mT, found.Vh):
        torch.testing.assert_close(vectors @ vectors.mT, torch.eye(rank), rtol=0, atol=1e-4)


@pytest.mark.parametrize("rank", [8, 12, 40])  # 40 of 400 by a Gram, the others by a Krylov basis
@pytest.mark.parametrize("name", ["i^-1", "i^-0.5", "gaussian", "lora merged in bf16"])
def test_a_tight_tolerance_finds_the_last_direction_too(name, rank):
    matrix = SPECTRA[name]
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    found = truncated_svd(matrix, rank, tolerance=1e-5)
    gap = float((S[rank - 1] - S[rank]) / S[0])
    for exact, own in ((U[:, :rank], double(found.U)), (Vh[:rank].mT, double(found.Vh).mT)):
        outside = own - exact @ (exact.mT @ own)
        assert torch.linalg.matrix_norm(outside, 2) <= 2e-4 + 1e-6 / gap
