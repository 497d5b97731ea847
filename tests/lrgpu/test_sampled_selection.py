"""The cuts of several rows, found with a sample, are those that are found without, however good the sample is."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from lrgpu import sampled_selection
from lrgpu.sampled_selection import cuts
from lrgpu.selection import EVERYTHING, NOTHING, Cut, cut

SIZE = 60_000
COUNTS = [1, 7, 600, 18_000, 30_000, 59_400, 59_999]


def rows(dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """All different, on a grid, a third zero, a plateau in the middle, all equal, tiny to huge, with NaN."""
    draw = torch.randn(SIZE, generator=torch.Generator().manual_seed(3)).abs()
    given = [
        draw,
        (draw * 8).round() / 8,
        draw * (draw > 0.43),
        draw.where((draw < 0.5) | (draw > 0.9), 0.7),
        torch.full((SIZE,), 0.25),
        (draw * 60).exp().clamp_max(1e38) * 1e-40,
        draw.where(draw < 2.5, torch.nan),
    ]
    return [row.to(dtype) for row in given]


def blocks(given: list[Any], step: int = 7_001) -> list[list[Any]]:
    return [[row[start : start + step] for row in given] for start in range(0, SIZE, step)]


def sample(given: list[Any]) -> list[Any]:
    """Every tenth hundred."""
    return [row.reshape(-1, 10, 100)[:, 0] for row in given]


def alone(row: Any, count: int) -> Cut:
    return cut([row], count, SIZE)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.float16, torch.bfloat16])
def test_cuts_are_those_of_a_search(place: Callable[[torch.Tensor], Any], dtype: torch.dtype):
    if dtype is torch.bfloat16 and not isinstance(place(torch.zeros(1)), torch.Tensor):
        pytest.skip("CuPy has no bfloat16")
    given = [place(row) for row in rows(dtype)][:-1]
    for count in COUNTS:
        assert cuts(blocks(given), [count] * len(given), SIZE, sample(given)) == [alone(row, count) for row in given]


def test_one_read_is_enough(monkeypatch: pytest.MonkeyPatch):
    def no_search(*_: Any) -> Cut:
        raise AssertionError("searched")

    given = rows()[:6]
    expected = [[alone(row, count) for row in given] for count in COUNTS[2:]]
    monkeypatch.setattr(sampled_selection, "cut", no_search)
    for count, wanted in zip(COUNTS[2:], expected, strict=True):
        assert cuts(blocks(given), [count] * len(given), SIZE, sample(given)) == wanted


def test_every_row_has_its_own_count():
    given = rows()[:4]
    found = cuts(blocks(given), [0, 600, SIZE, 30_000], SIZE, sample(given))
    assert found == [NOTHING, alone(given[1], 600), EVERYTHING, alone(given[3], 30_000)]


@pytest.mark.parametrize("kind", ["far below", "far above", "one number"])
def test_a_sample_that_misleads_changes_nothing(kind: str):
    given = rows()[:6]
    wrong = {"far below": torch.zeros(3, 40), "far above": torch.full((3, 40), 1e30), "one number": torch.ones(1, 1)}
    for count in COUNTS:
        found = cuts(blocks(given), [count] * len(given), SIZE, [wrong[kind]] * len(given))
        assert found == [alone(row, count) for row in given]


def test_more_than_may_be_held_is_searched(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(sampled_selection, "_GATHERED", 10)
    given = rows()[:6]
    assert cuts(blocks(given), [30_000] * 6, SIZE, sample(given)) == [alone(row, 30_000) for row in given]


def test_nan_is_above_all_numbers():
    [row] = rows()[-1:]
    few, many = (cuts(blocks([row]), [count], SIZE, sample([row]))[0] for count in (100, 30_000))
    assert int(row.isnan().sum()) > 100
    assert math.isnan(few.threshold)
    assert math.isnan(alone(row, 100).threshold)
    assert many == alone(row, 30_000)
