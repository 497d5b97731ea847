"""Conversion: there and back gives the same delta, the real loaders accept the result, and what is lost is said."""

from __future__ import annotations

import copy
import hashlib
import json
import re
import sys
from pathlib import Path

import peft
import pytest
import torch
import transformers
from lrmerge.app import main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergekit_lr as lr
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError, LrmergeError, MismatchError, UsageError
from mergekit_lr.verbs.convert.plan import plan_convert

TARGETS = ["to_q", "to_out.0", "proj_in", "conv1", "ff.net.0.proj"]
SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
FACTS = {"ss_output_name": "x", "ss_network_dim": "?", "modelspec.title": "t", "modelspec.hash_sha256": "0x0"}


@pytest.fixture(scope="module")
def unet(tmp_path_factory):
    """A UNet that fits in a few kilobytes, and the folder that it was saved in."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    model = UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()
    folder = tmp_path_factory.mktemp("unet")
    model.save_pretrained(folder)
    return model, folder


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE)).eval()
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return model, folder


def trained(folder: Path, model, config) -> Path:
    """An adapter of any type that PEFT saved, all of its tensors away from their initial values."""
    torch.manual_seed(1)
    model = peft.get_peft_model(copy.deepcopy(model), config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) / 10)
    model.save_pretrained(folder)
    return folder


def dense(ref) -> dict[str, torch.Tensor]:
    adapter = ref if isinstance(ref, Adapter) else lr.open_adapter(ref).adapter
    return {name: weight.delta.to(torch.float64).dense() for name, weight in adapter.weights.items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float = 0.0) -> bool:
    return one.keys() == other.keys() and all(torch.allclose(d, other[n], rtol=0, atol=atol) for n, d in one.items())


def merged(model, folder: Path) -> dict[str, torch.Tensor]:
    """The weights that PEFT's own merge makes."""
    return peft.PeftModel.from_pretrained(copy.deepcopy(model), folder).merge_and_unload().state_dict()


def picture(model) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return model(image, 3, text).sample


def metadata(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return file.metadata()


def unet_lora(tmp_path: Path, model, **options) -> Path:
    config = peft.LoraConfig(r=4, lora_alpha=6, target_modules=TARGETS, rank_pattern={"conv1": 2}, **options)
    return trained(tmp_path / "peft", model, config)


# --- dialects


def pair_of(module: str) -> dict[str, torch.Tensor]:
    return {f"{module}.lora_down.weight": torch.ones(2, 4), f"{module}.lora_up.weight": torch.ones(5, 2)}


def test_every_dialect_and_back(tmp_path, unet):
    model, folder = unet
    source = unet_lora(tmp_path, model)
    wanted, before = picture(peft.PeftModel.from_pretrained(copy.deepcopy(model), source)), dense(source)
    assert not torch.allclose(wanted, picture(model), atol=1e-3)
    here = source
    for step, to in enumerate(("kohya", "diffusers", "lycoris", "peft")):
        out = tmp_path / (f"{step}" if to == "peft" else f"{step}.safetensors")
        report = lr.convert(here, out, to=to, base=folder)
        assert (report.to, set(report.states)) == (to, {"kept"})
        here = out
    # The scale of diffusers files goes into B, rounded once to float32.
    assert same(before, dense(here), atol=1e-7)
    assert torch.allclose(wanted, picture(peft.PeftModel.from_pretrained(copy.deepcopy(model), here)), atol=1e-5)
    exact = lr.convert(lr.convert(source, tmp_path / "k.safetensors", to="kohya").out, tmp_path / "p", to="peft")
    assert same(before, dense(exact.out))


@pytest.mark.parametrize("to", ["diffusers", "kohya"])
def test_diffusers_loads_the_result(tmp_path, unet, to):
    model, _ = unet
    source = unet_lora(tmp_path, model)
    wanted = picture(peft.PeftModel.from_pretrained(copy.deepcopy(model), source))
    lr.convert(source, tmp_path / "out.safetensors", to=to)
    tensors, facts = load_file(tmp_path / "out.safetensors"), metadata(tmp_path / "out.safetensors")
    target, alphas, config = copy.deepcopy(model), None, None
    if to == "kohya":
        from diffusers.loaders import StableDiffusionLoraLoaderMixin

        tensors, alphas = StableDiffusionLoraLoaderMixin.lora_state_dict(tensors, unet_config=model.config)
    elif "lora_adapter_metadata" in facts:
        config = json.loads(facts["lora_adapter_metadata"])
    target.load_lora_adapter(tensors, network_alphas=alphas, metadata=config, prefix="unet")
    assert torch.allclose(wanted, picture(target), atol=1e-5)


def test_names_with_lost_dots_are_the_base_s(tmp_path, unet):
    model, folder = unet
    path = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors = {f"lora_unet_{path.replace('.', '_')}.lora_{side}.weight": torch.randn(2, 8) for side in ("down",)}
    tensors[f"lora_unet_{path.replace('.', '_')}.lora_up.weight"] = torch.randn(8, 2)
    save_file(tensors, tmp_path / "k.safetensors")
    report = lr.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", base=folder)
    assert [module.name for module in report.modules] == [f"unet.{path}.weight"]
    peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out")
    assert list(dense(tmp_path / "out")) == [f"{path}.weight"]


def test_metadata_survives_and_hashes_are_true(tmp_path, unet):
    source = unet_lora(tmp_path, unet[0])
    lr.convert(source, tmp_path / "a.safetensors", to="kohya")
    save_file(load_file(tmp_path / "a.safetensors"), tmp_path / "a.safetensors", FACTS)
    lr.convert(tmp_path / "a.safetensors", tmp_path / "p", to="peft")
    lr.convert(tmp_path / "p", tmp_path / "b.safetensors", to="kohya", dtype="float16")
    facts = metadata(tmp_path / "b.safetensors")
    assert (facts["ss_output_name"], facts["modelspec.title"], facts["ss_network_dim"]) == ("x", "t", "Dynamic")
    data = (tmp_path / "b.safetensors").read_bytes()
    digest = hashlib.sha256(data[8 + int.from_bytes(data[:8], "little") :]).hexdigest()
    assert facts["modelspec.hash_sha256"] == f"0x{digest}"


def test_one_component_of_a_pipeline(tmp_path):
    text = "text_model_encoder_layers_0_self_attn_q_proj"
    tensors = {}
    for module in (f"lora_te_{text}", "lora_unet_mid_block_attentions_0_proj_in"):
        tensors |= {f"{module}.lora_down.weight": torch.randn(2, 4), f"{module}.lora_up.weight": torch.randn(5, 2)}
    save_file(tensors, tmp_path / "k.safetensors")
    with pytest.raises(UsageError, match="this adapter has text_encoder, unet; choose with --component"):
        lr.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft")
    report = lr.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", component="unet")
    assert list(dense(tmp_path / "out")) == ["mid_block.attentions.0.proj_in.weight"]
    assert report.states == {"left out": 1, "kept": 1}
    lr.convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", to="diffusers")
    assert same(dense(tmp_path / "k.safetensors"), dense(tmp_path / "d.safetensors"))


def test_scales_that_are_powers_of_two_keep_half_precision(tmp_path):
    delta = LowRank(torch.randn(2, 4).half(), torch.randn(5, 2).half(), 0.5)
    adapter = Adapter({"unet.mid_block.attentions.0.proj_in.weight": AdaptedWeight(Kind.LINEAR, delta)})
    lr.convert(lr.convert(adapter, to="kohya").adapter, tmp_path / "d.safetensors", to="diffusers")
    assert {tensor.dtype for tensor in load_file(tmp_path / "d.safetensors").values()} == {torch.float16}
    assert same(dense(adapter), dense(tmp_path / "d.safetensors"))


def test_differences_in_full_become_factors_where_there_is_no_room_for_them(tmp_path, unet):
    model, folder = unet
    torch.manual_seed(0)
    path = "down_blocks_0_resnets_0_conv1"
    low = torch.randn(8, 3) @ torch.randn(3, 72)
    tensors = {f"lora_unet_{path}.diff": low.view(8, 8, 3, 3), f"lora_unet_{path}.diff_b": torch.randn(8)}
    save_file(tensors, tmp_path / "l.safetensors")
    with pytest.raises(UsageError, match="which peft has no place for; give --base"):
        lr.convert(tmp_path / "l.safetensors", tmp_path / "out", to="peft")
    report = lr.convert(tmp_path / "l.safetensors", tmp_path / "out", to="peft", base=folder, error=1e-4)
    assert (report.modules[0].state, report.modules[0].rank) == ("decomposed", 3)
    assert report.error < 1e-4
    assert [(other.part, other.name) for other in report.others] == [
        ("added", "unet.down_blocks.0.resnets.0.conv1.bias")
    ]
    after = merged(model, tmp_path / "out")
    for name, part in (("weight", "diff"), ("bias", "diff_b")):
        wanted = model.state_dict()[f"down_blocks.0.resnets.0.conv1.{name}"] + tensors[f"lora_unet_{path}.{part}"]
        assert torch.allclose(after[f"down_blocks.0.resnets.0.conv1.{name}"], wanted, atol=1e-4)


def test_names_of_a_model_s_own_code_go_to_comfy_and_back(tmp_path):
    tensors = pair_of("lora_unet_double_blocks_0_img_attn_qkv")
    tensors["lora_unet_double_blocks_0_img_attn_qkv.alpha"] = torch.tensor(1.0)
    save_file(tensors, tmp_path / "k.safetensors")
    lr.convert(tmp_path / "k.safetensors", tmp_path / "c.safetensors", to="comfy")
    assert "diffusion_model.double_blocks.0.img_attn.qkv.lora_A.weight" in load_file(tmp_path / "c.safetensors")
    lr.convert(tmp_path / "c.safetensors", tmp_path / "back.safetensors", to="kohya")
    back = load_file(tmp_path / "back.safetensors")
    assert back.keys() == tensors.keys()
    assert all(torch.equal(back[name], tensors[name]) for name in tensors)
    with pytest.raises(UsageError, match="named as in the model's original code"):
        lr.convert(tmp_path / "k.safetensors", tmp_path / "d.safetensors", to="diffusers")
    assert not (tmp_path / "d.safetensors").exists()


# --- PEFT's types


@pytest.mark.parametrize(
    "config",
    [
        peft.LoHaConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
        peft.LoKrConfig(r=2, alpha=3, target_modules=["q_proj", "down_proj"]),
        peft.AdaLoraConfig(init_r=3, total_step=9, target_modules=["q_proj", "down_proj"]),
        peft.VeraConfig(r=3, target_modules=["q_proj", "o_proj"]),
        peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
        peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False),
        peft.LoraConfig(r=2, init_lora_weights="pissa", target_modules=["q_proj", "down_proj"]),
    ],
    ids=lambda config: f"{config.peft_type.value}-{getattr(config, 'init_lora_weights', '')}",
)
def test_other_types_become_a_lora(tmp_path, llama, config):
    model, folder = llama
    source = trained(tmp_path / "source", model, config)
    report = lr.convert(source, tmp_path / "out", to="peft", base=folder, rank=16)
    assert {module.state for module in report.modules} == {"decomposed"}
    assert json.loads((tmp_path / "out" / "adapter_config.json").read_text())["peft_type"] == "LORA"
    wanted, got, base = merged(model, source), merged(model, tmp_path / "out"), model.state_dict()
    assert any(not torch.allclose(wanted[name], base[name], atol=1e-3) for name in wanted)
    assert all(torch.allclose(wanted[name], got[name], atol=1e-5) for name in wanted)


def test_a_type_that_needs_its_base_says_so(tmp_path, llama):
    source = trained(tmp_path / "source", llama[0], peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(UsageError, match="of type LOHA needs its base to be read; give --base"):
        lr.convert(source, tmp_path / "out", to="peft")
    assert not (tmp_path / "out.partial").exists()


@pytest.mark.parametrize("options", [{"energy": 0.9}, {"rank": 2}, {"error": 0.5}])
def test_the_loss_of_a_dense_change_is_exact(tmp_path, llama, options):
    model, folder = llama
    config = peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False)
    source = trained(tmp_path / "source", model, config)
    report = lr.convert(source, tmp_path / "out", to="peft", base=folder, **options)
    wanted, got, base = merged(model, source), dense(tmp_path / "out"), model.state_dict()
    for module in report.modules:
        change = (wanted[module.name] - base[module.name]).double()
        error = float((change - got[module.name]).norm() / change.norm())
        assert module.error == pytest.approx(error, rel=1e-3)
        assert 0 < module.error < 0.98
        assert module.energy >= options.get("energy", 0)
        assert module.error <= options.get("error", 1)
        assert module.rank <= options.get("rank", 16)


@pytest.mark.parametrize("options", [{}, {"lora_bias": True}], ids=["plain", "bias"])
def test_a_dora_is_folded_into_factors(tmp_path, llama, options):
    model, folder = llama
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj", "down_proj"])
    source = trained(tmp_path / "source", model, config)
    report = lr.convert(source, tmp_path / "out", to="peft", base=folder, dora="fold", rank=16)
    assert {module.state for module in report.modules} == {"folded"}
    wanted, got = merged(model, source), merged(model, tmp_path / "out")
    assert all(torch.allclose(wanted[name], got[name], atol=1e-5) for name in wanted)
    kept = lr.convert(source, tmp_path / "kept", to="peft", base=folder)
    assert kept.states == {"kept": 8}
    assert all(torch.equal(wanted[name], tensor) for name, tensor in merged(model, tmp_path / "kept").items())
    with pytest.raises(UsageError, match="give --base"):
        lr.convert(source, tmp_path / "x", to="peft", dora="fold")


def test_a_dora_of_convolutions_goes_through_lycoris(tmp_path, unet):
    model, folder = unet
    source = unet_lora(tmp_path, model, use_dora=True)
    with pytest.raises(UsageError, match="save as lycoris"):
        lr.convert(source, tmp_path / "k.safetensors", to="kohya")
    lr.convert(source, tmp_path / "l.safetensors", to="lycoris")
    lr.convert(tmp_path / "l.safetensors", tmp_path / "back", to="peft", base=folder)
    wanted, got = merged(model, source), merged(model, tmp_path / "back")
    assert all(torch.allclose(wanted[name], got[name], atol=1e-6) for name in wanted)


# --- ties: PEFT changes the end that an adapter names, and the other one stays

TIED = {
    "factors": peft.LoraConfig(r=4, lora_alpha=6, target_modules=["embed_tokens", "q_proj"]),
    "factors of the head": peft.LoraConfig(r=4, target_modules=["lm_head", "q_proj"]),
    "saved table": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
    "saved head": peft.LoraConfig(r=4, target_modules=["q_proj"], modules_to_save=["lm_head"]),
    "saved together": peft.LoraConfig(
        r=4, target_modules=["q_proj"], modules_to_save=["embed_tokens"], ensure_weight_tying=True
    ),
    "rows": peft.LoraConfig(r=4, target_modules=["q_proj"], trainable_token_indices=[3, 9]),
    "another type": peft.LoHaConfig(r=2, target_modules=["q_proj"], modules_to_save=["embed_tokens"]),
}


def tied_recipe(source: Path, base: Path) -> dict:
    return {
        "version": 1,
        "merge_method": "task_arithmetic",
        "base_model": str(base),
        "adapters": [{"adapter": str(source)}],
        "output": {"rank": 16},
    }


WRITING = {
    "convert": lambda source, base, out: lr.convert(source, out, to="peft", base=base, rank=16),
    "convert without a base": lambda source, base, out: lr.convert(source, out, to="peft"),
    "convert in memory": lambda source, base, out: lr.convert(
        lr.convert(source, to="peft", base=base, rank=16).adapter, out, to="peft", base=base
    ),
    "compress": lambda source, base, out: lr.compress(source, out, error=0, base=base),
    "merge": lambda source, base, out: lr.merge(tied_recipe(source, base), out),
    "merge into a model": lambda source, base, out: lr.merge(
        tied_recipe(source, base) | {"output": {"kind": "model"}}, out
    ),
}


@pytest.fixture(scope="module", params=TIED)
def tied(request, tmp_path_factory):
    """A model with one table at both ends, its folder, an adapter of it, and what PEFT computes with that."""
    folder = tmp_path_factory.mktemp("tied")
    model = tied_llama(folder / "base")
    source = trained(folder / "adapter", model, TIED[request.param])
    wanted = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), source))
    assert (wanted - logits(model)).abs().max() > 1e-2
    return model, folder / "base", source, wanted


def tied_llama(folder: Path):
    torch.manual_seed(0)
    model = transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE, tie_word_embeddings=True)).eval()
    model.save_pretrained(folder)
    return model


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(torch.arange(12).reshape(2, 6)).logits


@pytest.mark.parametrize("way", WRITING)
def test_the_other_end_of_a_tie_stays_as_the_adapter_leaves_it(way, tied, tmp_path, request):
    model, base, source, wanted = tied
    if "another type" in request.node.callspec.id and way in ("compress", "convert without a base"):
        with pytest.raises(UsageError, match=r"is no LoRA yet|needs its base"):
            WRITING[way](source, base, tmp_path / "out")
        return
    WRITING[way](source, base, tmp_path / "out")
    if way == "merge into a model":
        found = logits(transformers.LlamaForCausalLM.from_pretrained(tmp_path / "out"))
    else:
        found = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("base", ["base", None])
def test_a_table_that_goes_into_the_base_still_changes_both_ends(base, tmp_path):
    """A tensor under the name of a base parameter is loaded into it: that is no module of its own."""
    model = tied_llama(tmp_path / "base")
    source = trained(tmp_path / "source", model, peft.LoraConfig(r=4, target_modules=["q_proj"]))
    file, generator = source / "adapter_model.safetensors", torch.Generator().manual_seed(2)
    table = torch.randn(SHAPE["vocab_size"], SHAPE["hidden_size"], generator=generator)
    save_file(load_file(file) | {"base_model.model.model.embed_tokens.weight": table}, file, {"format": "pt"})
    wanted = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), source))
    lr.convert(source, tmp_path / "out", to="peft", base=base and tmp_path / base)
    found = logits(peft.PeftModel.from_pretrained(copy.deepcopy(model), tmp_path / "out"))
    torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-5)


# --- experts


def moe(kind: str):
    torch.manual_seed(0)
    if kind == "mixtral":
        settings = transformers.MixtralConfig(**SHAPE, num_local_experts=3, num_experts_per_tok=1)
        return transformers.MixtralForCausalLM(settings)
    settings = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
    return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE, **settings))


STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


@pytest.mark.parametrize("kind", ["mixtral", "qwen3"])
def test_experts_apart_and_together_again(tmp_path, kind):
    model = moe(kind)
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj"], target_parameters=STACKS)
    source = trained(tmp_path / "source", model, config)
    options = {"to": "peft", "base": tmp_path / "base"}
    report = lr.convert(source, tmp_path / "single", experts="per-expert", **options)
    assert report.states == {"kept": 2, "split": 4}
    names = set(dense(tmp_path / "single"))
    single = "block_sparse_moe.experts.2.w1" if kind == "mixtral" else "mlp.experts.2.gate_proj"
    assert f"model.layers.1.{single}.weight" in names
    assert len(names) == 2 + 2 * 3 * 3
    lr.convert(tmp_path / "single", tmp_path / "fused", experts="fused", **options)
    assert same(dense(source), dense(tmp_path / "fused"))
    wanted, got = merged(model, source), merged(model, tmp_path / "fused")
    assert all(torch.equal(wanted[name], got[name]) for name in wanted)


def test_experts_with_factors_of_their_own_are_joined_exactly(tmp_path):
    model = moe("qwen3")
    model.save_pretrained(tmp_path / "base")
    weights, wanted = {}, {}
    for expert, rank in ((0, 2), (2, 3)):
        for part, (rows, columns) in {"gate": (8, 16), "up": (8, 16), "down": (16, 8)}.items():
            delta = LowRank(torch.randn(rank, columns), torch.randn(rows, rank), expert + 0.5)
            weights[f"model.layers.0.mlp.experts.{expert}.{part}_proj.weight"] = AdaptedWeight(Kind.LINEAR, delta)
            wanted[expert, part] = delta.dense()
    report = lr.convert(Adapter(weights), tmp_path / "out", to="peft", experts="fused", base=tmp_path / "base")
    assert report.states == {"fused": 6}
    base, got = model.state_dict(), merged(model, tmp_path / "out")
    change = {name: got[f"model.layers.0.{name}"] - base[f"model.layers.0.{name}"] for name in STACKS}
    assert torch.allclose(change[STACKS[0]][2], torch.cat([wanted[2, "gate"], wanted[2, "up"]]), atol=1e-4)
    assert torch.allclose(change[STACKS[1]][0], wanted[0, "down"], atol=1e-4)
    assert not change[STACKS[0]][1].any()


def test_without_a_base_experts_have_the_common_names(tmp_path):
    delta = LowRank(torch.randn(2, 3, 4), torch.randn(2, 6, 3), 2.0)
    adapter = Adapter({"m.mlp.experts.gate_up_proj": AdaptedWeight(Kind.EXPERTS, delta)})
    single = lr.convert(adapter, to="peft", experts="per-expert").adapter
    assert list(single.weights)[1] == "m.mlp.experts.0.up_proj.weight"
    assert same(dense(adapter), dense(lr.convert(single, to="peft", experts="fused").adapter))
    odd = Adapter({"m.mlp.experts.w13": AdaptedWeight(Kind.EXPERTS, delta)})
    with pytest.raises(UsageError, match="how single experts of this stack are called is not known; give --base"):
        lr.convert(odd, to="peft", experts="per-expert")


# --- bad input


def run(*arguments: object, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["lrmerge", *map(str, arguments)])
    code = 0
    try:
        main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.mark.parametrize(
    ("tensors", "error", "message"),
    [
        (pair_of("lora_unet_mid_block_attentions_0_proj_in") | {"x.lora_A.weight": torch.ones(1, 1)}, FormatError,
         "mixes dialects"),
        ({"lora_unet_mid_block_attentions_0_proj_in.lora_down.weight": torch.ones(2, 4)}, FormatError, "no B"),
        (pair_of("lora_unet_mid_block_frobnicator_0"), FormatError, "'frobnicator' is no known word"),
        (pair_of("lora_unet_mid_block_proj_in") | {"lora_unet_mid_block_proj_in.wobble": torch.ones(1)}, FormatError,
         "not understood"),
        ({k: v * float("nan") for k, v in pair_of("lora_unet_mid_block_attentions_0_proj_in").items()}, FormatError,
         "NaN or Inf"),
        ({"nothing": torch.ones(1)}, FormatError, "no known adapter dialect"),
    ],
    ids=["mixed", "half", "word", "unknown", "nan", "nothing"],
)  # fmt: skip
def test_bad_files(tmp_path, tensors, error, message):
    save_file(tensors, tmp_path / "bad.safetensors")
    with pytest.raises(error, match=message):
        lr.convert(tmp_path / "bad.safetensors", tmp_path / "out", to="peft")
    assert [path.name for path in tmp_path.iterdir()] == ["bad.safetensors"]


def test_another_base_is_told_apart(tmp_path, llama, unet):
    source = unet_lora(tmp_path, unet[0])
    lr.convert(source, tmp_path / "k.safetensors", to="kohya")
    with pytest.raises(LrmergeError, match=r"base has no|does not have|another base"):
        lr.convert(tmp_path / "k.safetensors", tmp_path / "out", to="peft", base=llama[1])
    loha = trained(tmp_path / "loha", llama[0], peft.LoHaConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises((FormatError, MismatchError), match=r"not in the base|another base"):
        lr.convert(loha, tmp_path / "out", to="peft", base=unet[1])
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--to", "kohya"], "is in no known part of an image model"),
        (["--to", "kohya", "--component", "unet"], "a kohya adapter is one file"),
        (["--to", "peft", "--rank", "0"], "--rank 0: a number from 1"),
        (["--to", "peft", "--rank", "2", "--error", "0.1"], "--rank and --error both choose"),
        (["--to", "peft", "--energy", "7"], "energy must be between"),
        (["--to", "peft", "--dtype", "int4"], "--dtype int4: choose"),
        (["--to", "peft", "--dora", "fold"], "--dora fold: a DoRA rescales"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(tmp_path, llama, monkeypatch, capsys, options, message):
    source = trained(tmp_path / "source", llama[0], peft.LoraConfig(r=2, target_modules=["q_proj"]))
    code, shown, said = run(
        "convert", source, "-o", tmp_path / "out", *options, "-q", monkeypatch=monkeypatch, capsys=capsys
    )
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert re.search(message, said)
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


@pytest.mark.parametrize(
    ("config", "options"),
    [
        (peft.LoraConfig(r=3, target_modules=["q_proj", "embed_tokens"], modules_to_save=["lm_head"]), {}),
        (peft.LoraConfig(r=3, target_modules=["q_proj"], lora_bias=True), {"dtype": "float16"}),
        (peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]), {}),
        (peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj", "down_proj"]), {"dora": "fold", "rank": 5}),
        (peft.OFTConfig(oft_block_size=4, target_modules=["q_proj"], use_cayley_neumann=False), {"rank": 4}),
    ],
    ids=["saved", "half", "dora", "folded", "oft"],
)
def test_the_plan_says_what_will_be_written(tmp_path, llama, config, options):
    model, base = llama
    source = trained(tmp_path / "source", model, config)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    plan = plan_convert(source, to="peft", base=base, **options)
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before
    report = lr.convert(source, tmp_path / "out", to="peft", base=base, **options)
    assert {step.name: step.rank for step in plan.steps} == {module.name: module.rank for module in report.modules}
    assert all(step.exact for step in plan.steps) == (report.error == 0)
    tensors = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert plan.written == plan.to_json()["written_bytes"] == sum(tensor.nbytes for tensor in tensors.values())


def test_threads_and_memory_change_nothing_but_the_way(tmp_path, llama):
    model, base = llama
    config = peft.OFTConfig(oft_block_size=4, target_modules=["q_proj", "down_proj"], use_cayley_neumann=False)
    source = trained(tmp_path / "source", model, config)
    files = []
    for name, options in (("one", {"threads": 1}), ("three", {"threads": 3}), ("tight", {"memory": "3GB"})):
        lr.convert(source, tmp_path / name, to="peft", base=base, rank=4, **options)
        files.append((tmp_path / name / "adapter_model.safetensors").read_bytes())
    assert files[0] == files[1] == files[2]


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        (("--memory", "1MB"), 1, "before it reads anything; give more"),
        (("--memory", "much"), 2, "--memory much is not a size"),
        (("--threads", "0"), 2, "--threads 0: at least 1"),
        (("--device", "tpu"), 2, "--device tpu: choose auto, cpu"),
    ],
)
def test_what_the_machine_cannot_give_is_one_line(tmp_path, unet, monkeypatch, capsys, options, error, message):
    command = ("convert", unet_lora(tmp_path, unet[0]), "--to", "kohya", "-o", tmp_path / "out.safetensors", *options)
    code, _, said = run(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert (code, said.count("\n")) == (error, 1)
    assert message in said
    assert not (tmp_path / "out.safetensors").exists()


def test_a_dry_run_prints_keys_bytes_and_what_may_be_lost(tmp_path, llama, monkeypatch, capsys):
    model, base = llama
    config = peft.LoraConfig(r=3, use_dora=True, target_modules=["q_proj"], modules_to_save=["lm_head"])
    source = trained(tmp_path / "source", model, config)
    command = ("convert", source, "--to", "peft", "--base", base, "-o", tmp_path / "out", "--dry-run")
    shown = run(*command, "--threads", 3, monkeypatch=monkeypatch, capsys=capsys)[1]
    assert "copy: 2 modules, 768 B" in shown
    assert "beside the factors: 1 saved kept, 2 magnitude kept" in shown
    assert "nothing is lost" in shown
    assert "2.9 kB of tensors to write, on cpu with 3 workers" in shown
    folded = run(*command, "--dora", "fold", "--rank", 2, "-v", monkeypatch=monkeypatch, capsys=capsys)[1]
    assert "fold model.layers.0.self_attn.q_proj.weight rank 2 256 B" in folded
    assert "2 modules may lose what their rank does not hold" in folded
    assert "at most 2.6 kB of tensors to write" in folded
    told = json.loads(run(*command, "--json", monkeypatch=monkeypatch, capsys=capsys)[1])
    assert [(module["action"], module["bytes"], module["exact"]) for module in told["modules"]] == [
        ("copy", 384, True)
    ] * 2
    assert [other["part"] for other in told["others"]] == ["saved", "magnitude", "magnitude"]
    assert not (tmp_path / "out").exists()


def test_the_command_says_what_it_did(tmp_path, unet, monkeypatch, capsys):
    source = unet_lora(tmp_path, unet[0])
    out = tmp_path / "out.safetensors"
    plan = run("convert", source, "--to", "kohya", "-o", out, "--dry-run", monkeypatch=monkeypatch, capsys=capsys)
    assert "peft -> kohya" in plan[1]
    assert not out.exists()
    code, shown, _ = run("convert", source, "--to", "kohya", "-o", out, monkeypatch=monkeypatch, capsys=capsys)
    assert code == 0
    assert "kohya, total rank" in shown
    code, _, said = run("convert", source, "--to", "kohya", "-o", out, "-q", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "exists already" in said
    command = ("convert", source, "--to", "kohya", "-o", out, "--overwrite", "--json")
    code, shown, _ = run(*command, monkeypatch=monkeypatch, capsys=capsys)
    assert json.loads(shown)["totals"]["error"] == 0
    assert json.loads(out.with_suffix(".lrmerge.json").read_text())["verb"] == "convert"
