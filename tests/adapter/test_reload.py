"""Adapters that were read here and saved as PEFT LoRA: the real PEFT loads them and computes what it computed before.

For every type whose change is exactly low-rank, DoRA and fused experts among them: the original adapter in PEFT and
our LoRA in PEFT give the same logits.
"""

from __future__ import annotations

import copy
import json
import warnings
from pathlib import Path

import peft
import pytest
import torch
import transformers
from safetensors.torch import load_file

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.peft import open_peft, save
from mergekit_lr.adapter.variants import open_variant
from mergekit_lr.adapter.variants.residual import method_of
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import layout_of, read_whole

CASES = [
    "adalora-llama-rank-pattern",
    "delora-llama",
    "dora-llama",
    "gralora-llama",
    "hra-llama",
    "loha-llama",
    "loha-resnet-conv",
    "lokr-llama-decompose",
    "lora-gpt2-fanin",
    "lora-llama-embedding",
    "lora-llama-kasa",
    "lora-llama-patterns",
    "lora-llama-pissa",
    "lora-llama-rslora-patterns",
    "lora-qwen2-lora_bias",
    "lora-qwen3moe-target_parameters",
    "miss-llama",
    "psoft-llama",
    "tinylora-llama",
    "vblora-llama",
    "vera-llama-mixed-shapes",
]
VECTORS = Path(__file__).parents[1] / "vectors" / "peft"


@pytest.mark.parametrize("case", CASES)
def test_peft_computes_the_same_with_our_file(case: str, tmp_path: Path):
    folder = VECTORS / case
    facts = json.loads((folder / "case.json").read_text())
    model = getattr(transformers, facts["model_class"]).from_pretrained(folder / "base", dtype=torch.float32).eval()
    base = Checkpoint.open(folder / "base")
    layout = layout_of(base)
    config = json.loads((folder / "adapter" / "adapter_config.json").read_text())
    adapter: Adapter
    if config["peft_type"] == "LORA" and not method_of(config):
        adapter = open_peft(folder / "adapter", layout=layout)
    else:
        tensors = load_file(folder / "adapter" / "adapter_model.safetensors")
        adapter = open_variant(tensors, config, layout.by_name, read=lambda p: read_whole(base, p)).adapter()
    assert not adapter.added
    save(adapter, tmp_path, layout=layout)

    wanted, got = (outputs(with_adapter(copy.deepcopy(model), path)) for path in (folder / "adapter", tmp_path))
    before = outputs(model)
    assert (wanted - before).norm() / before.norm() > 1e-3, "the adapter does next to nothing"
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def with_adapter(model: torch.nn.Module, folder: Path) -> torch.nn.Module:
    """The model with an adapter loaded; PEFT warns about keys that are missing and collects those it cannot place."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*missing adapter keys.*")
        warnings.filterwarnings("ignore", message="(?!.*missing adapter keys)")
        wrapped = peft.PeftModel.from_pretrained(model, folder).eval()
        if wrapped.peft_config["default"].peft_type == "LORA":
            report = peft.set_peft_model_state_dict(wrapped, peft.utils.load_peft_weights(str(folder)))
            assert not report.unexpected_keys
    return wrapped


def outputs(model: torch.nn.Module) -> torch.Tensor:
    """Logits for tokens or pictures that are the same every time."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        if size := getattr(model.config, "vocab_size", None):
            return model(input_ids=torch.randint(size, (2, 7), generator=generator)).logits
        return model(pixel_values=torch.randn(2, model.config.num_channels, 32, 32, generator=generator)).logits
