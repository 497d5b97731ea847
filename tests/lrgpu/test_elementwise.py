"""Deltas are exact in float32, whatever the dtype, strides and size of the inputs, and so is their norm."""

from __future__ import annotations

import math

import pytest
import torch
from arrays import double, normal
from lrgpu.elementwise import delta


def exact(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    dtype = torch.float64 if a.dtype == torch.float64 else torch.float32
    return a.to(dtype) - b.to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(600, 501), (7,), (), (3, 40, 50), (4, 3, 3, 3), (1, 300000), (0, 5)])
def test_delta_is_the_float32_difference(shape, dtype):
    a, b = normal(*shape).to(dtype), normal(*shape, seed=1).to(dtype)
    found = delta(a, b)
    assert torch.equal(found.matrix, exact(a, b))
    assert found.squared_norm == pytest.approx((exact(a, b).double() ** 2).sum().item(), rel=1e-7)


def test_devices_agree(place):
    a, b = normal(300, 200), normal(300, 200, seed=1)
    found = delta(place(a), place(b))
    assert torch.equal(double(found.matrix), exact(a, b).double())
    assert found.squared_norm == pytest.approx((exact(a, b).double() ** 2).sum().item(), rel=1e-7)


def test_the_norm_of_rounded_numbers_keeps_seven_digits():
    a, b = normal(2000, 1024).bfloat16(), normal(2000, 1024, seed=1).bfloat16()
    assert delta(a, b).squared_norm == pytest.approx((exact(a, b).double() ** 2).sum().item(), rel=1e-7)


def test_out_is_filled_and_returned():
    a, b = normal(300, 200).half(), normal(300, 200, seed=1).half()
    out = torch.empty(300, 200)
    assert delta(a, b, out=out).matrix is out
    assert torch.equal(out, exact(a, b))


@pytest.mark.parametrize(
    ("turn_a", "turn_b", "turn_out"),
    [(1, 1, 0), (1, 1, 1), (1, 0, 0), (0, 1, 1), (1, 1, None), (0, 1, None)],
)
def test_any_strides(turn_a, turn_b, turn_out):
    def lay(x, turn):
        return x.mT.contiguous().mT if turn else x

    a, b = normal(700, 500).bfloat16(), normal(700, 500, seed=1).bfloat16()
    out = None if turn_out is None else lay(torch.empty(700, 500), turn_out)
    found = delta(lay(a, turn_a), lay(b, turn_b), out=out)
    assert torch.equal(found.matrix, exact(a, b))
    assert found.squared_norm == pytest.approx((exact(a, b).double() ** 2).sum().item(), rel=1e-7)


def test_slices_of_a_larger_tensor_and_read_only_memory(tmp_path):
    a = normal(64, 300)[:, 7:207]
    path = tmp_path / "raw"
    path.write_bytes(normal(64, 200, seed=1).numpy().tobytes())
    b = torch.from_file(str(path), shared=False, size=64 * 200).view(64, 200)
    assert torch.equal(delta(a, b).matrix, a - b)


def test_a_transposed_delta_keeps_the_memory_order_of_its_inputs():
    a = normal(50, 40).mT
    assert delta(a, a).matrix.mT.is_contiguous()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_norm_is_not_finite_exactly_when_the_delta_is_not(bad):
    a, b = normal(300, 200), normal(300, 200, seed=1)
    a[123, 45] = bad
    assert not math.isfinite(delta(a, b).squared_norm)
    a[123, 45] = 3e38  # finite, though its square is not in float32
    found = delta(a, b)
    assert found.squared_norm == pytest.approx(float((found.matrix.double() ** 2).sum()), rel=1e-7)


def test_tiny_and_zero_deltas():
    a = normal(100, 100)
    assert delta(a, a).squared_norm == 0.0
    tiny = a * 1e-25
    assert delta(tiny, 0 * a).squared_norm == pytest.approx(float((tiny.double() ** 2).sum()), rel=1e-7)


def test_what_does_not_fit_is_refused():
    a = normal(4, 5)
    with pytest.raises(ValueError, match=r"\(4, 5\).*\(5, 4\)"):
        delta(a, a.mT)
    with pytest.raises(ValueError, match="out must be"):
        delta(a, a, out=torch.empty(4, 5, dtype=torch.float64))
    with pytest.raises(TypeError, match="list"):
        delta([1.0], [1.0])
