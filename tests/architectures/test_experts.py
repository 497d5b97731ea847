"""Mixtures of experts, as transformers writes them and in the other layout: one tensor per expert, or one stack."""

import json
import re
from pathlib import Path

import pytest
import torch
import transformers as T
from finetune import read, roundtrip
from safetensors.torch import save_file
from test_text import IDS, SMALL

from mergekit_lr.checkpoint.parameter import Kind


def mixtral():
    return T.MixtralForCausalLM(T.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen2_moe():
    settings = T.Qwen2MoeConfig(
        **SMALL, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, shared_expert_intermediate_size=12,
        mlp_only_layers=[1],
    )  # fmt: skip
    return T.Qwen2MoeForCausalLM(settings)


def qwen3_moe():
    settings = T.Qwen3MoeConfig(
        **SMALL, head_dim=8, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, mlp_only_layers=[0]
    )
    return T.Qwen3MoeForCausalLM(settings)


def deepseek_v3():
    settings = T.DeepseekV3Config(
        **SMALL, n_routed_experts=4, num_experts_per_tok=2, moe_intermediate_size=8, n_group=1, topk_group=1,
        first_k_dense_replace=1, q_lora_rank=8, kv_lora_rank=8, qk_nope_head_dim=8, qk_rope_head_dim=4, v_head_dim=8,
    )  # fmt: skip
    return T.DeepseekV3ForCausalLM(settings)


def gpt_oss():
    settings = T.GptOssConfig(
        **SMALL, head_dim=8, num_local_experts=4, num_experts_per_tok=2, sliding_window=16,
    )  # fmt: skip
    return T.GptOssForCausalLM(settings)


def llama4():
    settings = T.Llama4TextConfig(
        **SMALL, intermediate_size_mlp=24, head_dim=8, num_local_experts=4, num_experts_per_tok=1,
        attention_chunk_size=16,
    )  # fmt: skip
    return T.Llama4ForCausalLM(settings)


def fuse(folder: Path) -> None:
    """Write the experts of a checkpoint as one stack per layer, as the model has them in memory."""
    tensors, _ = read(folder)
    names = {"gate_proj": "gate", "w1": "gate", "up_proj": "up", "w3": "up", "down_proj": "down", "w2": "down"}
    experts: dict[str, dict[str, dict[int, torch.Tensor]]] = {}
    for name in list(tensors):
        if match := re.fullmatch(r"(.*\.experts)\.(\d+)\.(\w+)\.weight", name):
            parts = experts.setdefault(match[1], {"gate": {}, "up": {}, "down": {}})
            parts[names[match[3]]][int(match[2])] = tensors.pop(name)
    assert experts
    for path, parts in experts.items():
        stacks = {part: torch.stack([found[e] for e in sorted(found)]) for part, found in parts.items()}
        path = path.replace("block_sparse_moe", "mlp")
        tensors[f"{path}.gate_up_proj"] = torch.cat((stacks["gate"], stacks["up"]), 1)
        tensors[f"{path}.down_proj"] = stacks["down"]
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


@pytest.mark.parametrize("everything", [False, True], ids=["matrices", "everything"])
@pytest.mark.parametrize("rewrite", [None, fuse], ids=["as_written", "fused"])
@pytest.mark.parametrize("build", [mixtral, qwen2_moe, qwen3_moe, deepseek_v3], ids=lambda build: build.__name__)
def test_experts_on_disk_one_by_one_or_fused(build, rewrite, everything, tmp_path):
    made = roundtrip(build(), {"input_ids": IDS}, tmp_path, everything=everything, rewrite=rewrite)
    assert not made.plan.refused
    stacks = [p for p in made.layout.parameters if p.kind is Kind.EXPERTS]
    assert {p.name.rpartition(".")[2] for p in stacks} == {"gate_up_proj", "down_proj"}
    assert {p.name for p in stacks} <= set(made.plan.factors)
    # The routers are no linear layers in memory: they are saved in full.
    assert set(made.plan.reasons) == {p.name for p in made.layout.parameters if p.name.endswith("mlp.gate.weight")}


@pytest.mark.parametrize("everything", [False, True], ids=["matrices", "everything"])
@pytest.mark.parametrize("build", [gpt_oss, llama4], ids=lambda build: build.__name__)
def test_stacks_that_are_one_on_disk_too(build, everything, tmp_path):
    made = roundtrip(build(), {"input_ids": IDS}, tmp_path, everything=everything)
    assert not made.plan.refused
    stacks = {p.name: p.kind for p in made.layout.parameters if p.carrier == "parameter" and len(p.shape) == 3}
    assert len(stacks) == 4
    assert set(stacks) <= set(made.plan.factors)
    # Llama 4 has its axes the other way round as well, but says nothing of it, and PEFT asks only what it says.
    assert set(stacks.values()) == {Kind.EXPERTS_TRANSPOSED if build is gpt_oss else Kind.EXPERTS}


def test_dense_layers_among_experts_are_targeted_by_their_parameter(tmp_path):
    """PEFT takes every target that ends in gate_proj for an expert's, so these are no target modules."""
    made = roundtrip(deepseek_v3(), {"input_ids": IDS}, tmp_path, everything=False)
    config = json.loads((made.folder / "adapter_config.json").read_text())
    assert "model.layers.0.mlp.gate_proj.weight" in config["target_parameters"]
    assert "model.layers.1.mlp.shared_experts.up_proj.weight" in config["target_parameters"]
    assert not [name for name in config["target_modules"] if name.endswith(("gate_proj", "up_proj", "down_proj"))]
