"""Merging all that adapters hold, into any dialect, and loading it by the real loaders; and the API in memory."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import layout_of, read_whole
from mergekit_lr.errors import LrmergeError

VECTORS = Path(__file__).parent / "vectors" / "peft"
# Layers that stand in a model several times have no weights of their own to merge into.
CASES = sorted(p.name for p in VECTORS.iterdir() if p.name != "lora-llama-layer-replication")


def recipe(refs, method: str = "task_arithmetic", **more: Any) -> dict[str, Any]:
    return {"version": 1, "merge_method": method, "adapters": [{"adapter": str(ref)} for ref in refs], **more}


# --- one adapter with weight 1 is that adapter


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_of_any_type_makes_the_model_that_it_makes_alone(case, tmp_path):
    folder, out = VECTORS / case, tmp_path / "out"
    made = recipe([folder / "adapter"], base_model=str(folder / "base"), output={"kind": "model"})
    lr.merge(made, out)
    lr.apply(folder / "base", [folder / "adapter"], tmp_path / "applied")
    found, wanted = (Checkpoint.open(path) for path in (out, tmp_path / "applied"))
    assert found.tensors.keys() == wanted.tensors.keys()
    for name in wanted.tensors:
        torch.testing.assert_close(
            found.read(name), wanted.read(name), rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}"
        )
