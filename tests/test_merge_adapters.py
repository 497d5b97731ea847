"""Merging all that adapters hold, into any dialect, and loading it by the real loaders; and the API in memory."""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.parameter import Kind
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
        with pytest.raises(
            LrmergeError, match=r"is of full rank, no adapter; give output\.rank, or output\.kind: model"
        ):
            lr.merge(made, tmp_path / "out")
        made["output"] = {"rank": 256}
    lr.merge(made, tmp_path / "out")
    lr.apply(folder / "base", [folder / "adapter"], tmp_path / "applied", dtype="float32")
    wanted = outputs(model_of(folder, tmp_path / "applied"))
    got = outputs(in_peft(model_of(folder, folder / "base"), tmp_path / "out"))
    assert (got - wanted).norm() / wanted.norm() < 1e-4


# --- several adapters, loaded by PEFT


SHAPE = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 56,
}  # fmt: skip
LORAS: dict[str, dict[str, Any]] = {
    "attention": {"r": 3, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]},
    "patterns": {
        "r": 4, "lora_alpha": 2, "target_modules": ["q_proj", "down_proj"], "rank_pattern": {"down_proj": 2},
        "alpha_pattern": {"q_proj": 5}, "use_rslora": True,
    },
    "table": {"r": 2, "target_modules": ["q_proj", "embed_tokens"]},
    "dora": {"r": 2, "target_modules": ["q_proj", "down_proj"], "use_dora": True},
    "dora2": {"r": 3, "target_modules": ["q_proj", "v_proj"], "use_dora": True},
    "norm": {"r": 2, "target_modules": ["q_proj"], "modules_to_save": ["model.norm", "lm_head"]},
    "norm2": {"r": 2, "target_modules": ["v_proj"], "modules_to_save": ["model.norm", "lm_head"]},
    "rows": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [3, 7, 5]}},
    "rows2": {"r": 2, "target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [5, 9]}},
}  # fmt: skip


@pytest.fixture(scope="module")
def llama(tmp_path_factory) -> tuple[torch.nn.Module, Path]:
    """A small Llama, its folder ``base``, and beside it adapters that PEFT made, away from their initial values."""
    folder = tmp_path_factory.mktemp("llama")
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    model.save_pretrained(folder / "base")
    for seed, (name, config) in enumerate(LORAS.items(), 1):
        trained(folder / name, model, peft.LoraConfig(task_type="CAUSAL_LM", **config), seed)
    trained(folder / "loha", model, peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]), 20)
    trained(folder / "vera", model, peft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"]), 21)
    return model, folder


def trained(folder: Path, model: torch.nn.Module, config: peft.PeftConfig, seed: int) -> None:
    torch.manual_seed(seed)
    wrapped = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in wrapped.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 5)
    wrapped.save_pretrained(folder)


def weights_of(model: torch.nn.Module, adapter: Path) -> dict[str, Tensor]:
    """The weights that PEFT's own merge makes, in float64."""
    merged = peft.PeftModel.from_pretrained(copy.deepcopy(model), str(adapter)).merge_and_unload()
    return {name: tensor.double() for name, tensor in merged.state_dict().items()}


def differences(model: torch.nn.Module, folder: Path, names: list[str]) -> dict[str, list[Tensor]]:
    """Of every weight, what PEFT makes each adapter change it by."""
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    changed = [weights_of(model, folder / name) for name in names]
    return {name: [own[name] - tensor for own in changed] for name, tensor in base.items()}


def close(got: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert got.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(
            got[name].double(), tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


RUNS: dict[str, dict[str, Any]] = {
    "full": {"method": "ties", "output": {"rank": 24}, "parameters": {"density": 0.6}},
    "core": {"method": "ties", "space": "core", "parameters": {"density": 0.6}},
    "knots": {"method": "ties", "space": "knots", "parameters": {"density": 0.6}},
    "core_space": {"method": "core_space", "parameters": {"inner": "tsv_m", "rank": 4}},
    "cat": {"method": "cat"},
    "lora_lego": {"method": "lora_lego"},
    "svd": {"method": "svd", "parameters": {"rank": 5}},
    "linear": {"method": "linear"},
}


@pytest.mark.parametrize("run", RUNS)
def test_merged_adapters_in_peft_compute_what_the_report_claims(llama, tmp_path, run):
    model, folder = llama
    names = ["attention", "patterns", "table"]
    made = recipe([folder / name for name in names], base_model=str(folder / "base"), **RUNS[run])
    report = lr.merge(made, tmp_path / "out")
    assert report.states == {"merged": 8}  # q, v and down of two layers, the table, and PEFT's copy of the table
    own = lr.open_adapter(tmp_path / "out").adapter
    claimed = {n: t.double() for n, t in model.state_dict().items()}
    for name, weight in own.weights.items():
        delta = weight.delta.to(torch.float64).dense()
        claimed[name] = claimed[name] + (delta.mT if weight.kind is Kind.EMBEDDING else delta)
    close(weights_of(model, tmp_path / "out"), claimed)
    live = in_peft(model, tmp_path / "out")
    baked = copy.deepcopy(model)
    baked.load_state_dict(claimed)
    torch.testing.assert_close(outputs(live), outputs(baked), rtol=1e-4, atol=1e-4)
    for tensor in (tensor for tensor in report.tensors if tensor.rank is not None):
        delta = own.weights[tensor.name].delta.to(torch.float64)
        kept = float(delta.norm().square())
        assert tensor.squared_norm - tensor.rounding == pytest.approx(kept, rel=1e-4, abs=1e-8)
    assert (report.rounding_error > 1e-3) == (run in ("svd", "core_space"))


def test_sums_of_all_kinds_of_parts_are_the_sums_of_what_peft_merges(llama, tmp_path):
    model, folder = llama
    names = ["patterns", "table", "norm", "rows", "rows2", "loha", "vera"]
    refs, base = [folder / name for name in names], str(folder / "base")
    made = recipe(refs, base_model=base, output={"rank": 24}, parameters={"weight": 0.5})
    lr.merge(made, tmp_path / "out")
    lr.merge(made | {"output": {"kind": "model"}}, tmp_path / "model")
    parts = differences(model, folder, names)
    wanted = {name: tensor.double() + 0.5 * sum(parts[name]) for name, tensor in model.state_dict().items()}
    close(load_file(tmp_path / "model" / "model.safetensors"), wanted)
    close(weights_of(model, tmp_path / "out"), wanted, 1e-4)
    in_peft(model, tmp_path / "out")
