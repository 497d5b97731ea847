"""Order statistics without sorting, against sorting."""

from __future__ import annotations

import math

import pytest
import torch
from lrgpu.selection import EVERYTHING, NOTHING, cut, kth_smallest, largest

DTYPES = [torch.float32, torch.float64, torch.float16, torch.bfloat16]


def numbers(kind: str, count: int = 300_000) -> torch.Tensor:
    """Magnitudes: all different, from a coarse grid with many equals, mostly zero, or from subnormal to huge."""
    draw = torch.randn(count, generator=torch.Generator().manual_seed(3)).abs()
    return {
        "normal": draw,
        "grid": (draw * 8).round() / 8,
        "zeros": draw * (draw > 1.5),
        "wide": (draw * 60).exp().clamp_max(1e38) * 1e-40,
        "equal": torch.full((count,), 0.25),
    }[kind]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["normal", "grid", "zeros", "wide", "equal"])
def test_kth_smallest_is_that_of_sorting(kind, dtype):
    given = numbers(kind).to(dtype)
    ordered = given.sort().values
    for k in (1, 2, 1000, 150_000, 299_999, 300_000):
        assert kth_smallest(given.split(70_001), k) == float(ordered[k - 1])


def test_a_rank_that_there_is_not_is_refused():
    for k in (0, 4):
        with pytest.raises(ValueError, match=f"between 1 and 3, got {k}"):
            kth_smallest([torch.ones(3)], k)


@pytest.mark.parametrize("kind", ["normal", "grid", "zeros", "equal"])
@pytest.mark.parametrize("count", [0, 1, 100_000, 299_999, 300_000])
def test_a_cut_keeps_exactly_so_many_and_the_first_among_equals(kind, count):
    given = numbers(kind)
    threshold, end = cut(given.split(65_537), count, len(given))
    places = torch.arange(len(given))
    kept = (given > threshold) | ((given == threshold) & (places < end))
    expected = torch.zeros(len(given), dtype=torch.bool)
    expected[given.sort(descending=True, stable=True).indices[:count]] = True
    assert torch.equal(kept, expected)
    assert torch.equal(largest(given[None], count)[0], expected)


def test_the_ends_of_a_cut():
    given = torch.tensor([0.0, 1.0])
    assert cut([given], 0, 2) == NOTHING == (math.inf, 0)
    assert cut([given], 2, 2) == EVERYTHING
    assert EVERYTHING.threshold < 0


def test_every_row_has_its_own_count():
    given = torch.stack([numbers("grid", 1000), numbers("normal", 1000), numbers("zeros", 1000)])
    assert largest(given, [10, 0, 1000]).sum(-1).tolist() == [10, 0, 1000]
