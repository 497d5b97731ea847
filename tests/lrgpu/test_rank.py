"""Ranks are the least that meet their targets, and a shared budget is spent as well as it can be."""

from __future__ import annotations

import itertools

import pytest
import torch
from arrays import normal
from hypothesis import given, settings
from hypothesis import strategies as st
from lrgpu.rank import RankRule, allocate, noise_floor

SPECTRUM = [4.0, 3.0, 2.0, 1.0, 0.0]  # squares 16 9 4 1 0, in all 30


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (RankRule(count=3), 3),
        (RankRule(count=0), 0),
        (RankRule(count=99), 5),
        (RankRule(energy=25 / 30), 2),  # reached exactly
        (RankRule(energy=25.01 / 30), 3),
        (RankRule(energy=0.0), 0),
        (RankRule(energy=1.0), 4),
        (RankRule(error=0.0), 4),
        (RankRule(error=1.0), 0),
        (RankRule(error=(5 / 30) ** 0.5), 2),
        (RankRule(error=(4.99 / 30) ** 0.5), 3),
        (RankRule(floor=2.0), 2),
        (RankRule(floor=0.0), 4),
        (RankRule(floor=9.0), 0),
        (RankRule(energy=0.99, floor=2.0), 2),
        (RankRule(energy=0.5, floor=2.0), 1),
        (RankRule(count=1, energy=0.9), 3),
        (RankRule(count=3, multiple_of=2), 4),
        (RankRule(count=5, multiple_of=4), 5),
        (RankRule(energy=0.99, max_rank=2), 2),
        (RankRule(count=3, multiple_of=2, max_rank=3), 3),
    ],
    ids=repr,
)
def test_the_least_rank_that_meets_the_target(rule, rank):
    assert rule.choose(SPECTRUM, 30.0, 5) == rank
    assert rule.choose(torch.tensor(SPECTRUM), 30.0, 5) == rank


@pytest.mark.parametrize(
    ("rule", "rank"),
    [
        (RankRule(count=4), 4),
        (RankRule(energy=25 / 30), 2),
        (RankRule(energy=0.9), None),
        (RankRule(energy=1.0), None),
        (RankRule(energy=0.9, max_rank=2), 2),
        (RankRule(energy=0.9, max_rank=3), None),
        (RankRule(floor=1.5), None),
        (RankRule(floor=3.5), 1),
        (RankRule(floor=1.5, count=1), 1),
        (RankRule(floor=3.5, energy=0.99), 1),
        (RankRule(floor=1.5, energy=0.99), None),
    ],
    ids=repr,
)
def test_with_two_values_known_a_rule_says_whether_it_needs_more(rule, rank):
    assert rule.choose(SPECTRUM[:2], 30.0, 5) == rank


def test_a_zero_matrix_has_rank_zero():
    for rule in (RankRule(count=3), RankRule(energy=1.0), RankRule(error=0.0), RankRule(floor=0.0)):
        assert rule.choose([0.0, 0.0], 0.0, 2) == 0


def test_energy_one_is_the_numerical_rank_of_a_rounded_matrix():
    values = torch.linalg.svdvals(normal(60, 5) @ normal(5, 50, seed=1))
    assert RankRule(energy=1.0).choose(values, float((values.double() ** 2).sum()), 50) == 5


@pytest.mark.parametrize(
    "wrong",
    [
        {},
        {"count": -1},
        {"energy": 1.1},
        {"energy": float("nan")},
        {"error": -0.1},
        {"floor": -1.0},
        {"count": 1, "multiple_of": 0},
        {"count": 1, "max_rank": 0},
    ],
    ids=repr,
)
def test_a_rule_that_makes_no_sense_is_refused(wrong):
    with pytest.raises(ValueError, match=r"must be|needs"):
        RankRule(**wrong)


@given(
    values=st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=12).map(lambda x: sorted(x, reverse=True)),
    energy=st.floats(1e-6, 0.999),
    known=st.integers(1, 12),
)
def test_energy_is_met_and_one_less_would_not_do(values, energy, known):
    total = sum(s * s for s in values)
    rank = RankRule(energy=energy).choose(values, total, len(values))
    assert rank is not None
    assert sum(s * s for s in values[:rank]) >= energy * total * (1 - 1e-9)
    assert rank == 0 or sum(s * s for s in values[: rank - 1]) < energy * total * (1 + 1e-9)
    assert RankRule(energy=energy).choose(values[:known], total, len(values)) in (rank, None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_noise_floor_is_the_norm_of_what_rounding_adds(dtype):
    W = 0.02 * normal(400, 600, dtype=torch.float64)
    rounding = torch.linalg.svdvals(W.to(dtype).double() - W)[0].item()
    assert noise_floor(0.02, (400, 600), dtype) == pytest.approx(rounding, rel=0.05)


def energy_of(spectra, ranks):
    return sum(s * s for values, rank in zip(spectra, ranks, strict=True) for s in values[:rank])


@settings(max_examples=60, deadline=None)
@given(
    spectra=st.lists(
        st.lists(st.floats(0.1, 10), min_size=0, max_size=4).map(lambda x: sorted(x, reverse=True)),
        min_size=1,
        max_size=4,
    ),
    budget=st.integers(0, 12),
)
def test_with_equal_costs_no_other_ranks_capture_more(spectra, budget):
    ranks = allocate(spectra, [1.0] * len(spectra), budget)
    best = max(
        energy_of(spectra, other)
        for other in itertools.product(*(range(len(values) + 1) for values in spectra))
        if sum(other) <= budget
    )
    assert sum(ranks) <= budget
    assert energy_of(spectra, ranks) == pytest.approx(best)


def test_dear_matrices_get_less_and_limits_hold():
    spectra = [[3.0, 2.0, 1.0, 0.0], torch.tensor([3.0, 2.0, 1.0])]
    assert allocate(spectra, [1, 100], 103) == [3, 1]
    assert allocate(spectra, [1, 1], 100) == [3, 3]
    assert allocate(spectra, [1, 1], 100, max_rank=1) == [1, 1]
    assert allocate(spectra, [1, 1], 5, multiple_of=2) == [2, 3]
    assert allocate(spectra, [1, 1], 0) == [0, 0]
    assert allocate([], [], 5) == []


def test_what_does_not_fit_together_is_refused():
    with pytest.raises(ValueError, match="1 spectra but 2 costs"):
        allocate([[1.0]], [1, 2], 3)
    with pytest.raises(ValueError, match="positive"):
        allocate([[1.0]], [0], 3)
