"""Devices and array libraries that the machine has: ``place`` for arithmetic on arrays, ``device`` for methods."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch


@pytest.fixture(params=["torch-cpu", "torch-cuda", "cupy"])
def place(request: pytest.FixtureRequest) -> Callable[[torch.Tensor], Any]:
    """Puts a CPU tensor where the test is to run; skips by name where there is no such place."""
    name = request.param
    if name != "torch-cpu" and not torch.cuda.is_available():
        pytest.skip(f"{name}: no CUDA device")
    if name == "cupy":
        if importlib.util.find_spec("cupy") is None:
            pytest.skip("cupy is not installed")
        import cupy

        return lambda tensor: cupy.asarray(tensor.numpy())
    return lambda tensor: tensor.to(name.removeprefix("torch-"))


@pytest.fixture(params=["cpu", "cuda"])
def device(request: pytest.FixtureRequest) -> str:
    """Methods take torch tensors, on any of its devices."""
    if request.param == "cuda" and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    return request.param
