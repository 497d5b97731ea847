"""Intruder dimensions against the full SVDs that their definition speaks of, and the checks of ``inspect``."""

from __future__ import annotations

import pytest
import torch
from lrgpu.spectral import heaviest_atom
from lrmerge.app import main
from safetensors.torch import save_file

import mergekit_lr as lr
from mergekit_lr.adapter import peft
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.verbs.check import check_base
from mergekit_lr.verbs.intruders import intruders

NAME = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def base_weight():
    generator = torch.Generator().manual_seed(0)
    u = torch.linalg.qr(torch.randn(60, 48, generator=generator))[0]
    v = torch.linalg.qr(torch.randn(48, 48, generator=generator))[0]
    return (u * torch.linspace(2.0, 0.2, 48)) @ v.mT


@pytest.fixture
def base(tmp_path, base_weight):
    save_file({NAME: base_weight}, tmp_path / "base.safetensors")
    return tmp_path / "base.safetensors"


def write(tmp_path, delta: LowRank, name: str = NAME):
    folder = tmp_path / "adapter"
    folder.mkdir(exist_ok=True)
    peft.save(Adapter({name: AdaptedWeight(Kind.LINEAR, delta)}, base="base"), folder)
    return folder


def spike(size: float, base_weight, seed: int = 1) -> LowRank:
    """A direction that lies along no single left singular vector of the base."""
    generator = torch.Generator().manual_seed(seed)
    u = torch.nn.functional.normalize(torch.randn(60, 1, generator=generator), dim=0)
    v = torch.nn.functional.normalize(torch.randn(1, 48, generator=generator), dim=1)
    return LowRank(size * v, u)


@pytest.mark.parametrize("size", [0.0, 0.3, 1.0, 3.0])
def test_intruders_are_those_of_the_definition(tmp_path, base, base_weight, size):
    delta = spike(size, base_weight)
    u0 = torch.linalg.svd(base_weight.double(), full_matrices=False)[0]
    u = torch.linalg.svd(base_weight.double() + delta.dense(), full_matrices=False)[0]
    similarity = (u0.mT @ u[:, :10]).abs().amax(0)
    expected = {i: float(similarity[i]) for i in range(10) if similarity[i] < 0.5}
    found = {i.index: i for i in intruders(base, write(tmp_path, delta))}
    assert found.keys() == expected.keys()
    assert all(expected[index] <= i.similarity + 1e-4 for index, i in found.items())
    if size == 3.0:
        assert 0 in found
    if size == 0.0:
        assert not found


def test_no_threshold_finds_none(tmp_path, base, base_weight):
    assert intruders(base, write(tmp_path, spike(3.0, base_weight)), epsilon=0.0) == ()


@pytest.mark.parametrize("steps", [20, 60])
def test_the_heaviest_atom_is_bounded_and_found(steps):
    generator = torch.Generator().manual_seed(3)
    q = torch.linalg.qr(torch.randn(60, 60, generator=generator, dtype=torch.float64))[0]
    operator = (q * torch.linspace(1.0, 0.01, 60).double()) @ q.mT
    mixed = torch.nn.functional.normalize(torch.randn(60, 3, generator=generator, dtype=torch.float64), dim=0)
    along = torch.nn.functional.normalize(q[:, :1] + 0.3 * mixed[:, :1], dim=0)
    vectors = torch.cat([mixed, along], 1)
    true = (q.mT @ vectors).square().amax(0)
    found = heaviest_atom(lambda x: operator @ x, vectors, threshold=0.25, max_steps=steps)
    assert bool((found.bound >= true - 1e-9).all())
    assert bool(((true >= 0.25) == (found.mass >= 0.25))[found.decided].all())
    if steps == 60:
        assert bool(found.decided.all())
        assert bool(found.decided[3])


def test_an_adapter_that_finds_no_module_is_told(tmp_path, base, base_weight, capsys):
    fitting = write(tmp_path, spike(1.0, base_weight))
    assert check_base(fitting, base) == ()
    assert main_code(["inspect", str(fitting), "--check", "--base", str(base)]) == 0
    other = write(tmp_path, spike(1.0, base_weight), "model.layers.9.self_attn.q_proj.weight")
    assert len(check_base(other, base)) == 1
    capsys.readouterr()
    assert main_code(["inspect", str(other), "--check", "--base", str(base)]) == 1
    assert "do not fit" in capsys.readouterr().err


def test_the_shape_is_checked_too(tmp_path, base):
    problems = check_base(write(tmp_path, LowRank(torch.ones(2, 9), torch.ones(60, 2))), base)
    assert "[60, 9]" in problems[0]
    assert "[60, 48]" in problems[0]


def test_questions_need_what_they_ask_about(tmp_path, base, base_weight):
    fitting = write(tmp_path, spike(1.0, base_weight))
    assert main_code(["inspect", str(fitting), "--check"]) == 2
    assert main_code(["inspect", str(fitting), "--for", "nothing"]) == 2
    assert main_code(["inspect", str(base), "--for", "vllm"]) == 2
    assert main_code(["inspect", str(fitting), "--for", "vllm"]) == 0
    with pytest.raises(lr.LrmergeError, match="no such parameter"):
        intruders(base, write(tmp_path, spike(1.0, base_weight), "x.weight"))


def main_code(arguments: list[str]) -> int:
    import sys
    from unittest.mock import patch

    with patch.object(sys, "argv", ["lrmerge", *arguments]):
        try:
            main()
        except SystemExit as stop:
            return int(stop.code or 0)
    return 0
