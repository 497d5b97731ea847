"""A matrix merged a block of elements at a time is the matrix merged whole, for every method that says it can be."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from mergekit_lr.methods import dare
from mergekit_lr.methods.blocks import STEP, Blocks, merge_blocks
from mergekit_lr.methods.merge_tensors import merge_tensors
from mergekit_lr.methods.registry import find, methods

SHAPE = (700, 901)  # some blocks and a bit
CASES: dict[str, list[dict[str, Any]]] = {
    "linear": [{"weights": [0.3, 0.5, 0.7]}, {"normalize": False}],
    "task_arithmetic": [{"weights": [0.3, -0.5, 0.7], "scale": 0.5}],
    "slerp": [{"t": 0.3}],
    "nuslerp": [{"weights": [0.3, 0.6]}],
    "multislerp": [{"weights": [0.3, 0.6, 0.2]}],
    "karcher": [{}],
    "model_stock": [{}, {"compat": "mergekit"}],
    "nearswap": [{"t": 0.001}],
    "ram": [{"epsilon": 1e-3}],
    "ties": [
        {"density": [0.2, 0.5, 1.0]},
        {"density": 0.3, "normalize": False, "elect_on": "unweighted", "weights": [1.0, -0.5, 0.2]},
        {"density": 0.0},
        {"threshold": 0.002, "majority": "count", "divide_by": "count"},
    ],
    "dare_linear": [{"density": [0.2, 0.5, 1.0]}, {"density": 0.4, "compat": "mergekit"}, {"rescale": False}],
    "dare_ties": [{"density": 0.4, "normalize": True}, {"density": 0.0, "compat": "mergekit"}],
    "breadcrumbs": [{"density": 0.5, "gamma": 0.1}, {"density": 0.9, "gamma": 0.3}],
    "breadcrumbs_ties": [{"density": [0.5, 0.0, 1.0], "gamma": 0.01, "compat": "mergekit"}],
}


def given(name: str) -> tuple[list[torch.Tensor], torch.Tensor | None]:
    """Models in bfloat16, so that deltas lie on a grid and many of them are equal."""
    draw = torch.Generator().manual_seed(0)
    base = (0.02 * torch.randn(SHAPE, generator=draw)).bfloat16()
    method = find(name)
    count = method.models[1] or 3
    tuned = [(base.float() + 0.002 * torch.randn(SHAPE, generator=draw)).bfloat16() for _ in range(count)]
    return tuned, base if method.takes == "deltas" or method.base == "required" else None


def test_every_method_that_says_it_can_is_here():
    assert {name for name, method in methods().items() if method.elementwise({})} == set(CASES)


def in_blocks(name: str, options: dict[str, Any], step: int = STEP) -> list[torch.Tensor]:
    """What ``given`` is merged to, block by block."""
    models, base = given(name)

    def reader(tensor: torch.Tensor) -> Any:
        def read(start: int, stop: int) -> torch.Tensor:
            assert stop - start <= step
            return tensor.reshape(-1)[start:stop]

        return read

    method = find(name)
    origin = None if base is None else reader(base)
    inputs = [reader(model) for model in models]
    blocks = Blocks(models[0].numel(), inputs, origin, deltas=method.takes == "deltas", step=step)
    labels = [f"{t}" for t in range(len(models))]
    return [part for _, part in merge_blocks(method, blocks, models=labels, tensor="q", seed=5, **options)]


@pytest.mark.parametrize(("name", "options"), [(name, case) for name, cases in CASES.items() for case in cases])
def test_blocks_and_the_whole_agree(name: str, options: dict[str, Any]):
    models, base = given(name)

    method = find(name)
    assert method.elementwise(options)
    parts = in_blocks(name, options)
    labels = [f"{t}" for t in range(len(models))]
    wide = [model.float() for model in models]
    whole = merge_tensors(
        name, wide, base=None if base is None else base.float(), seed=5, name_of_tensor="q", models=labels, **options
    )
    assert isinstance(whole, torch.Tensor)
    assert len(parts) == -(-models[0].numel() // STEP) > 1
    close = {"rtol": 1e-6, "atol": 1e-8} if method.measure is not None else {"rtol": 0.0, "atol": 0.0}
    torch.testing.assert_close(torch.cat(parts, -1).reshape(SHAPE), whole, **close)


def test_what_needs_the_whole_matrix_says_so():
    for name, options in {
        "ties": {"rescale": True},
        "nuslerp": {"nuslerp_flatten": False},
        "model_stock": {"filter_wise": True},
        "breadcrumbs": {"rescale": True},
        "iso_c": {},
    }.items():
        assert not find(name).elementwise(options)


@pytest.mark.parametrize("step", [1 << 14, 10_001])
def test_the_size_of_blocks_changes_nothing(step: int):
    for name in ("ties", "breadcrumbs", "dare_ties"):
        for options in CASES[name]:
            usual = torch.cat(in_blocks(name, options), -1)
            close = {"rtol": 1e-6, "atol": 0.0} if "compat" in options else {"rtol": 0.0, "atol": 0.0}
            torch.testing.assert_close(torch.cat(in_blocks(name, options, step), -1), usual, **close)


def test_masks_that_are_kept_are_those_that_are_drawn_again(monkeypatch: pytest.MonkeyPatch):
    options = {"density": [0.2, 0.5, 1.0], "compat": "mergekit"}
    kept = in_blocks("dare_linear", options)
    monkeypatch.setattr(dare, "_HELD", 0)
    assert all(torch.equal(a, b) for a, b in zip(kept, in_blocks("dare_linear", options), strict=True))


def test_a_sample_sees_every_column():
    columns = torch.arange(64).repeat(20_000).float()
    blocks = Blocks(columns.numel(), [lambda start, stop: columns[start:stop]], None, deltas=False)
    [sample] = blocks.sample()
    assert sample.ndim == 2
    assert sample.numel() < columns.numel() / 10
    assert torch.bincount(sample.flatten().int()).float().std() < 0.1 * sample.numel() / 64
    [whole] = Blocks(500, [lambda start, stop: columns[start:stop]], None, deltas=False).sample()
    assert torch.equal(whole.flatten(), columns[:500])
