"""Merging all that adapters hold, into any dialect, and loading it by the real loaders; and the API in memory."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import diffusers
import peft
import pytest
import torch
import transformers
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


# Types whose change is of full rank: an adapter holds it at a rank that its small matrices do not exceed.
FULL = (
    "boft", "c3a", "fourierft", "frod", "glora", "ia3", "lokr-resnet", "oft", "osf", "road2", "shira", "supertuning",
    "waveft", "randlora", "miss-llama-bat",
)  # fmt: skip


def in_peft(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with an adapter loaded; PEFT warns of keys that are missing and collects those it cannot place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        wrapped = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(folder)).eval()
    report = peft.set_peft_model_state_dict(wrapped, peft.utils.load_peft_weights(str(folder)))
    assert not report.unexpected_keys
    return wrapped


def model_of(case: Path, folder: Path) -> torch.nn.Module:
    """A checkpoint in the class of the case's model."""
    facts = json.loads((case / "case.json").read_text())
    return getattr(transformers, facts["model_class"]).from_pretrained(folder, dtype=torch.float32).eval()


def outputs(model: torch.nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if size := getattr(model.config, "vocab_size", None):
            return model(input_ids=torch.randint(size, (2, 7), generator=generator)).logits
        return model(pixel_values=torch.randn(2, model.config.num_channels, 32, 32, generator=generator)).logits


@pytest.mark.parametrize("case", CASES)
def test_one_adapter_of_any_type_makes_an_adapter_that_peft_computes_the_same_with(case, tmp_path):
    folder = VECTORS / case
    made = recipe([folder / "adapter"], base_model=str(folder / "base"))
    if case.startswith(FULL) or case == "lokr-llama":
        with pytest.raises(LrmergeError, match="is of full rank, no adapter; give output.rank, or output.kind: model"):
            lr.merge(made, tmp_path / "out")
        made["output"] = {"rank": 256}
    lr.merge(made, tmp_path / "out")
    lr.apply(folder / "base", [folder / "adapter"], tmp_path / "applied", dtype="float32")
    wanted = outputs(model_of(folder, tmp_path / "applied"))
    got = outputs(in_peft(model_of(folder, folder / "base"), tmp_path / "out"))
    assert (got - wanted).norm() / wanted.norm() < 1e-4
