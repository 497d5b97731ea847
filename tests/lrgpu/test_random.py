"""Random numbers by counter: what a mask may depend on, and that they are as even and independent as they should be."""

from __future__ import annotations

import pytest
import torch
from lrgpu.random import less, stream, uniform

LIKE = torch.empty(0)
MANY = 1 << 20


def test_any_part_of_a_stream_can_be_drawn_alone():
    keys = [stream(0, "layer", "a"), stream(0, "layer", "b")]
    whole = uniform(keys, 200_000, LIKE)
    for start, count in ((0, 1), (65_535, 3), (131_072, 5), (199_999, 1), (12_345, 150_000)):
        assert torch.equal(uniform(keys, count, LIKE, start=start), whole[:, start : start + count])
    assert torch.equal(uniform(keys[1:], 200_000, LIKE), whole[1:])


@pytest.mark.parametrize("limit", [-1.0, 0.0, 1e-9, 2.0**-24, 0.1, 0.5, 0.9, 1 - 2.0**-24, 1 - 1e-9, 1.0, 2.0])
def test_comparing_integers_is_comparing_numbers(limit):
    keys = [stream("a"), stream("b")]
    for start in (0, 77, (1 << 32) - 50_000):
        expected = uniform(keys, 100_000, LIKE, start=start) < limit
        assert torch.equal(less(keys, limit, 100_000, LIKE, start=start), expected.to(torch.uint8))


def test_numbers_are_even_in_every_stream():
    for name in range(4):
        [numbers] = uniform([stream(name)], MANY, LIKE)
        assert numbers.min() >= 0
        assert numbers.max() < 1
        counts = torch.histc(numbers, 256, 0, 1)
        chi2 = float(((counts - MANY / 256) ** 2 / (MANY / 256)).sum())
        assert 160 < chi2 < 370  # 255 degrees of freedom: beyond one in 10^5 on both sides


@pytest.mark.parametrize("lag", [1, 2, 3, 1024, 65_536])
def test_neighbours_in_a_stream_are_independent(lag):
    [numbers] = uniform([stream("lag")], MANY, LIKE).double() - 0.5
    correlation = float((numbers[:-lag] * numbers[lag:]).mean() * 12)
    assert abs(correlation) < 5 / MANY**0.5


def test_streams_are_independent_of_each_other():
    keys = [stream(seed, tensor, model) for seed in (0, 1) for tensor in ("q", "k") for model in ("0", "1")]
    numbers = uniform(keys, MANY, LIKE).double() - 0.5
    correlations = numbers @ numbers.T / MANY * 12 - torch.eye(len(keys))
    assert float(correlations.abs().max()) < 5.5 / MANY**0.5


def test_keys_that_differ_in_one_half_give_other_numbers():
    key = stream("half")
    numbers = uniform([key, key ^ 1, key ^ (1 << 32), key ^ (1 << 63)], MANY, LIKE).double() - 0.5
    correlations = numbers @ numbers.T / MANY * 12 - torch.eye(4)
    assert float(correlations.abs().max()) < 0.02


def test_counters_go_on_beyond_32_bits():
    key = stream("long")
    across = uniform([key], 100, LIKE, start=(1 << 32) - 50)
    assert torch.equal(across[:, 20:], uniform([key], 80, LIKE, start=(1 << 32) - 30))
    assert not torch.equal(uniform([key], 100, LIKE), uniform([key], 100, LIKE, start=1 << 32))
    assert torch.equal(uniform([key], 50, LIKE, start=(1 << 33) + 50), uniform([key], 100, LIKE, start=1 << 33)[:, 50:])
