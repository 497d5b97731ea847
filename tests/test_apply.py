"""Adapters baked into bases: what the real PEFT merges, to one rounding, in bounded memory, whatever interrupts it."""

from __future__ import annotations

import copy
import json
import random
import signal
from collections.abc import Callable
from pathlib import Path

import peft
import pytest
import tiny
import torch
import transformers as T
from processes import ROOM, finish_within, forking, in_a_group, killed, with_a_limit
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import mergekit_lr as lr
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import layout_of, read_whole
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import LrmergeError
from mergekit_lr.graph import schedule
from mergekit_lr.verbs.apply import plan as apply_plan
from mergekit_lr.verbs.apply.rounding import random_bits, rounded

VECTORS = Path(__file__).parent / "vectors" / "peft"
Q0 = "model.layers.0.self_attn.q_proj.weight"
IDS = {"input_ids": torch.tensor([[1, 5, 9, 2, 7, 11]])}
SMALL = {
    "hidden_size": 24, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 56, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
CONFIG = {"peft_type": "LORA", "r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "down_proj", "embed_tokens"]}


def lora(folder: Path, base: dict[str, Tensor], *, seed: int = 0, scale: float = 0.3, **config) -> Path:
    """A PEFT folder with random factors for every layer's q_proj and down_proj and for the table."""
    folder.mkdir()
    (folder / "adapter_config.json").write_text(json.dumps(CONFIG | config))
    rank, generator = (CONFIG | config)["r"], torch.Generator().manual_seed(seed)
    tensors = {}
    for name, weight in base.items():
        module, (rows, columns) = name.removesuffix(".weight"), (*weight.shape, 1)[:2]
        first, second = (scale * torch.randn(shape, generator=generator) for shape in ((rank, columns), (rows, rank)))
        if name == tiny.TABLE:
            tensors[f"{tiny.PREFIX}{module}.lora_embedding_A"] = second.mT.contiguous()
            tensors[f"{tiny.PREFIX}{module}.lora_embedding_B"] = first.mT.contiguous()
        elif name.endswith(("q_proj.weight", "down_proj.weight")):
            tensors[f"{tiny.PREFIX}{module}.lora_A.weight"] = first
            tensors[f"{tiny.PREFIX}{module}.lora_B.weight"] = second
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


def deltas(adapter: Path) -> dict[str, Tensor]:
    """Every delta of a folder that ``lora`` wrote, dense, in float64."""
    tensors, scaling = load_file(adapter / "adapter_model.safetensors"), CONFIG["lora_alpha"] / CONFIG["r"]
    found = {}
    for key, first in tensors.items():
        name = key.removeprefix(tiny.PREFIX).partition(".lora_")[0] + ".weight"
        if key.endswith("lora_A.weight"):
            found[name] = scaling * tensors[key.replace("lora_A", "lora_B")].double() @ first.double()
        elif key.endswith("lora_embedding_A"):
            found[name] = scaling * (tensors[key.replace("ing_A", "ing_B")].double() @ first.double()).mT
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


@pytest.fixture
def model(tmp_path) -> Path:
    return tiny.save(tmp_path / "base", tiny.decoder())


@pytest.fixture
def adapter(tmp_path) -> Path:
    return lora(tmp_path / "adapter", tiny.decoder())


# --- what PEFT merges ---


@pytest.mark.parametrize(
    "case", sorted(p.name for p in VECTORS.iterdir() if p.name not in ("lora-llama-layer-replication",))
)
def test_every_type_of_adapter_gives_what_peft_merged(case, tmp_path):
    folder, out = VECTORS / case, tmp_path / "out"
    report = lr.apply(folder / "base", [folder / "adapter"], out)
    merged = load_file(folder / "merged" / "model.safetensors")
    tolerance = json.loads((folder / "case.json").read_text())["tolerance"]
    result = Checkpoint.open(out)
    if case == "lora-llama-tied-embed":  # PEFT merges into the head too, and so into another function
        assert not json.loads((out / "config.json").read_text())["tie_word_embeddings"]
        merged["lm_head.weight"] = load_file(folder / "base" / "model.safetensors")["model.embed_tokens.weight"]
    for name, parameter in layout_of(result).by_name.items():
        torch.testing.assert_close(
            read_whole(result, parameter), merged[name], **tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )
    assert report.norm > 0
    assert sum(report.states.values()) == len(result.tensors)


def gpt2() -> nn.Module:
    return T.GPT2LMHeadModel(T.GPT2Config(n_embd=24, n_layer=2, n_head=4, vocab_size=56, n_positions=32))


def llama(**settings) -> nn.Module:
    return T.LlamaForCausalLM(T.LlamaConfig(**SMALL, **settings))


def mixtral() -> nn.Module:
    return T.MixtralForCausalLM(T.MixtralConfig(**SMALL, num_local_experts=4, num_experts_per_tok=2))


def qwen2() -> nn.Module:
    return T.Qwen2ForCausalLM(T.Qwen2Config(**SMALL, tie_word_embeddings=False))


EXPERTS = {"target_modules": ["q_proj"], "target_parameters": ["experts.gate_up_proj", "experts.down_proj"]}
LIVE: dict[str, tuple[Callable[[], nn.Module], dict]] = {
    "llama rslora": (llama, {"target_modules": ["q_proj", "down_proj"], "use_rslora": True}),
    "llama dora": (llama, {"target_modules": ["k_proj", "up_proj", "embed_tokens"], "use_dora": True}),
    "llama saved": (llama, {"target_modules": ["v_proj"], "modules_to_save": ["lm_head", "norm"]}),
    "llama tied": (lambda: llama(tie_word_embeddings=True), {"target_modules": ["embed_tokens", "q_proj"]}),
    "llama tied rows": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "trainable_token_indices": [3, 9]},
    ),
    "llama tied saved": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    ),
    "llama tied head saved": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    ),
    "llama tied together": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True},
    ),
    "llama tied saved together": (
        lambda: llama(tie_word_embeddings=True),
        {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"], "ensure_weight_tying": True},
    ),
    "qwen2 lora_bias": (qwen2, {"target_modules": ["q_proj", "v_proj"], "lora_bias": True}),
    "gpt2": (gpt2, {"target_modules": ["c_attn", "c_proj"], "fan_in_fan_out": True}),
    "mixtral": (mixtral, EXPERTS),
}


@pytest.mark.parametrize("case", LIVE)
def test_the_model_computes_what_the_adapter_computes(case, tmp_path):
    """Loaded by transformers, the result gives the outputs of PEFT's model before any merging."""
    torch.manual_seed(0)
    build, settings = LIVE[case]
    base = build().eval()
    base.save_pretrained(tmp_path / "base")
    adapted = peft.get_peft_model(copy.deepcopy(base), peft.LoraConfig(r=4, lora_alpha=6, **settings)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
    adapted.save_pretrained(tmp_path / "adapter")
    report = lr.apply(tmp_path / "base", [tmp_path / "adapter"], tmp_path / "out")
    merged = type(base).from_pretrained(tmp_path / "out").eval()
    with torch.no_grad():
        wanted, ours, before = (m(**IDS).logits for m in (adapted, merged, base))
    assert (wanted - before).abs().max() > 1e-2
    torch.testing.assert_close(ours, wanted, rtol=1e-4, atol=1e-4 * float(wanted.abs().max()))
    lr.apply(tmp_path / "base", [lr.open_adapter(tmp_path / "adapter").adapter], tmp_path / "memory")
    assert (
        tiny.contents(tmp_path / "out")["model.safetensors"] == tiny.contents(tmp_path / "memory")["model.safetensors"]
    )
    untied = json.loads((tmp_path / "out" / "config.json").read_text()).get("tie_word_embeddings")
    if "tied" in case:
        assert untied == (case.endswith(("rows", "together")))
    if case == "mixtral":  # on disk each expert and projection is a tensor of its own
        assert sum(".experts.0." in name for name in tensors_of(tmp_path / "out")) == 6
        assert {"experts", "linear"} == set(report.kinds)


def test_factors_at_both_ends_keep_the_tie(tmp_path):
    """What extract writes for a tied table: the same change at both ends, merged once."""
    config = tiny.CONFIG | {"tie_word_embeddings": True}
    base = {name: tensor for name, tensor in tiny.decoder().items() if name != tiny.HEAD}
    tuned = tiny.finetuned(base, rank=3)
    for name, tensors in (("base", base), ("tuned", tuned)):
        tiny.save(tmp_path / name, tensors, config=config)
    lr.extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "lora", rank=6)
    report = lr.apply(tmp_path / "base", [tmp_path / "lora"], tmp_path / "out")
    assert "new" not in report.states
    assert (tmp_path / "out" / "config.json").read_bytes() == (tmp_path / "base" / "config.json").read_bytes()
    torch.testing.assert_close(tensors_of(tmp_path / "out")[tiny.TABLE], tuned[tiny.TABLE], rtol=1e-5, atol=1e-5)
    memory = lr.extract(tmp_path / "base", tmp_path / "tuned", rank=6).adapter
    applied = lr.apply(tmp_path / "base", [memory]).tensors
    assert tiny.HEAD not in applied
    torch.testing.assert_close(applied[tiny.TABLE], tuned[tiny.TABLE], rtol=1e-5, atol=1e-5)


# --- sums and inverses ---


def test_weighted_adapters_are_the_dense_sum_rounded_once(tmp_path):
    base = tiny.decoder(dtype=torch.bfloat16)
    tiny.save(tmp_path / "base", base)
    given = [(lora(tmp_path / str(i), base, seed=i), weight) for i, weight in enumerate((0.7, -0.4, 1.5))]
    report = lr.apply(tmp_path / "base", given, tmp_path / "out")
    result, each = tensors_of(tmp_path / "out"), [(deltas(folder), weight) for folder, weight in given]
    for name, weight in base.items():
        total = sum((w * found[name] for found, w in each if name in found), torch.zeros(weight.shape).double())
        exact = weight.double() + total
        # One rounding; a sum that float32 puts on the other side of a tie may fall to the neighbour.
        ulp = torch.finfo(torch.bfloat16).eps * exact.abs()
        assert ((result[name].double() - exact).abs() <= 0.5001 * ulp + 1e-6).all(), name
        figures = next((f for f in report.changed if f.name == name), None)
        assert (figures is None) == (not total.any())
        if figures is not None:
            assert figures.norm == pytest.approx(float(total.norm()), rel=1e-5)
            lost = float((result[name].double() - exact).norm() / total.norm())
            assert figures.rounding_error == pytest.approx(lost, rel=1e-2)


def test_a_weight_counts_replaced_and_rescaled_tensors_as_differences(tmp_path):
    for case in ("lora-llama-modules-to-save", "dora-llama", "lora-llama-trainable-tokens"):
        folder = VECTORS / case
        merged, base = load_file(folder / "merged" / "model.safetensors"), tensors_of(folder / "base")
        half = lr.apply(folder / "base", [(folder / "adapter", 0.5)]).tensors
        assert half is not None
        for name, tensor in base.items():
            torch.testing.assert_close(half[name], (tensor + merged[name]) / 2, rtol=1e-4, atol=1e-5)


def test_extracting_what_was_applied_gives_the_delta(model, adapter, tmp_path):
    lr.apply(model, [adapter], tmp_path / "out")
    lr.extract(model, tmp_path / "out", tmp_path / "again", error=1e-4)
    found = tiny.factors(tmp_path / "again")
    for name, delta in deltas(adapter).items():
        torch.testing.assert_close(found[name], delta, rtol=1e-3, atol=1e-3 * float(delta.abs().max()))


def test_unmerge_takes_the_adapter_out(model, adapter, tmp_path):
    lr.apply(model, [(adapter, 0.7)], tmp_path / "merged")
    report = lr.apply(tmp_path / "merged", [(adapter, 0.7)], tmp_path / "back", unmerge=True)
    base, back = tiny.decoder(), tensors_of(tmp_path / "back")
    for name, tensor in base.items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-6, atol=1e-6)
    assert any("not bit for bit" in note for note in report.notes)


@pytest.mark.parametrize(
    ("case", "why"),
    [
        ("dora-llama", "a DoRA"),
        ("lora-llama-modules-to-save", "replaces it in full"),
        ("lora-llama-trainable-tokens", "replaces rows"),
        ("oft-llama", "computes its change from the base"),
    ],
)
def test_unmerge_refuses_what_is_gone(case, why, tmp_path):
    folder = VECTORS / case
    tiny.refused(
        "apply", folder / "base", folder / "adapter", "--unmerge", "-o", tmp_path / "out", code=2, words=(why,),
        out=tmp_path / "out",
    )  # fmt: skip


def test_unmerge_of_types_that_only_add(tmp_path):
    folder = VECTORS / "loha-llama"
    merged = lr.apply(folder / "base", [folder / "adapter"], tmp_path / "out")
    assert merged.norm > 0
    back = lr.apply(tmp_path / "out", [folder / "adapter"], unmerge=True).tensors
    for name, tensor in tensors_of(folder / "base").items():
        torch.testing.assert_close(back[name], tensor, rtol=1e-5, atol=1e-5)


# --- rounding ---


def test_random_bits_belong_to_their_place():
    whole = random_bits(3, "a.weight", 0, 1000)
    for start in (0, 1, 15, 16, 17, 500):
        assert torch.equal(random_bits(3, "a.weight", start, 77), whole[start : start + 77])
    assert not torch.equal(random_bits(4, "a.weight", 0, 1000), whole)
    assert not torch.equal(random_bits(3, "b.weight", 0, 1000), whole)
    assert whole.min() >= 0
    assert whole.max() < 1 << 16


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.001, -0.3337, 65.43, 3.3e-7, -6.0e-5])
def test_stochastic_rounding_is_unbiased_and_takes_neighbours_only(dtype, value):
    exact = torch.full((200_000,), value)
    found = rounded(exact, dtype, seed=0, name="a", start=0).double()
    low, high = found.unique().tolist() if len(found.unique()) == 2 else (value, value)
    assert low <= float(exact[0].double()) <= high
    assert high - low <= max(torch.finfo(dtype).eps * abs(value), 2.0**-24) * 1.0001
    assert float(found.mean() - exact[0].double()) == pytest.approx(0, abs=5 * (high - low) / 2 / 200_000**0.5)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_the_dtype_holds_is_not_moved(dtype):
    exact = torch.randn(1000).to(dtype).float()
    special = torch.tensor([0.0, -0.0, float("inf"), -float("inf")])
    for values in (exact, special):
        assert torch.equal(rounded(values, dtype, seed=1, name="a", start=0).float(), values)


def test_a_change_below_the_dtype_is_reported_and_survives_on_average(tmp_path):
    base = tiny.decoder(dtype=torch.bfloat16)
    tiny.save(tmp_path / "base", base)
    small = lora(tmp_path / "small", base, scale=0.003)
    delta = deltas(small)[tiny.DOWN]

    def survived(**options) -> tuple[float, lr.ApplyReport]:
        report = lr.apply(tmp_path / "base", [small], **options)
        assert report.tensors is not None
        moved = report.tensors[tiny.DOWN].double() - base[tiny.DOWN].double()
        return float((moved * delta).sum() / (delta * delta).sum()), report

    _, nearest = survived()
    figures = next(f for f in nearest.changed if f.name == tiny.DOWN)
    assert figures.rounding_error > 0.9
    assert any("spoils" in note and "--rounding stochastic" in note for note in nearest.notes)
    shares = [survived(rounding="stochastic", seed=seed)[0] for seed in range(20)]
    assert sum(shares) / len(shares) == pytest.approx(1, abs=0.5)
    kept, exact = survived(dtype="float32")
    assert kept == pytest.approx(1, abs=1e-3)
    assert exact.rounding_error == 0


@pytest.mark.parametrize("case", ["lora-llama-bf16", "dora-llama", "lora-llama-trainable-tokens", "lora-gpt2-fanin"])
def test_results_do_not_depend_on_how_the_work_is_cut(case, tmp_path, monkeypatch):
    folder, options = VECTORS / case, {"rounding": "stochastic", "dtype": "bfloat16"}
    lr.apply(folder / "base", [folder / "adapter"], tmp_path / "a", **options)
    monkeypatch.setattr(apply_plan, "PIECE", 100)
    monkeypatch.setattr(apply_plan, "COPY", 64)
    lr.apply(folder / "base", [folder / "adapter"], tmp_path / "b", threads=3, **options)
    one, other = tensors_of(tmp_path / "a"), tensors_of(tmp_path / "b")
    differ = sum(int((one[name] != other[name]).sum()) for name in one)
    # A product of other block sizes may differ in the last bit of float32, which tips one in many thousand entries.
    assert differ <= 2


# --- files ---


def test_a_sharded_base_keeps_its_files_and_untouched_ones_their_bytes(adapter, tmp_path):
    base = tiny.save(tmp_path / "base", tiny.decoder(), shards=3)
    keep = {"tokenizer.json": "{}", "chat_template.jinja": "x", "generation_config.json": "{}"}
    for name, text in (keep | {"README.md": "the base's own", "training_args.bin": "pickle"}).items():
        (base / name).write_text(text)
    (base / "onnx").mkdir()
    report = lr.apply(base, [adapter], tmp_path / "out")
    out = tmp_path / "out"
    shards = [f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)]
    assert sorted(p.name for p in out.iterdir()) == sorted(
        [*shards, *keep, "README.md", "config.json", "lrmerge.json", "model.safetensors.index.json"]
    )
    assert {name: (out / name).read_text() for name in keep} == keep
    assert "the base's own" not in (out / "README.md").read_text()
    assert any("onnx" in note for note in report.notes)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    assert index["weight_map"] == json.loads((base / "model.safetensors.index.json").read_text())["weight_map"]
    assert index["metadata"]["total_size"] == sum(tensor.nbytes for tensor in tiny.decoder().values())
    changed = {figures.name for figures in report.changed}
    for name, tensor in tensors_of(base).items():
        assert torch.equal(tensors_of(out)[name], tensor) == (name not in changed)
    manifest = json.loads((out / "lrmerge.json").read_text())
    assert manifest["totals"]["states"] == report.states
    assert manifest["adapters"][0]["weight"] == 1.0


def test_a_shard_that_no_adapter_touches_is_the_same_file(tmp_path):
    base = tiny.decoder()
    folder = tmp_path / "base"
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(tiny.CONFIG))
    files = {"model-00001-of-00002.safetensors": [Q0], "model-00002-of-00002.safetensors": sorted(base.keys() - {Q0})}
    for file, names in files.items():
        save_file({name: base[name] for name in names}, folder / file, metadata={"format": "pt"})
    lr.apply(folder, [lora(tmp_path / "adapter", {Q0: base[Q0]})], tmp_path / "out")
    second = "model-00002-of-00002.safetensors"
    assert (tmp_path / "out" / second).read_bytes() == (folder / second).read_bytes()


def test_files_cut_anew_load_in_transformers(model, adapter, tmp_path):
    report = lr.apply(model, [adapter], tmp_path / "out", shard_size="9kB", dtype="bfloat16")
    assert len(report.files) > 2
    assert all(size <= 9_000 for size in report.files.values())
    loaded = T.LlamaForCausalLM.from_pretrained(tmp_path / "out", dtype="auto")
    assert loaded.dtype == torch.bfloat16
    whole = lr.apply(model, [adapter], dtype="bfloat16").tensors
    state = loaded.state_dict()
    assert all(torch.equal(state[name], tensor) for name, tensor in whole.items())


def test_dtype_is_written_into_the_config(adapter, tmp_path):
    base = tiny.save(tmp_path / "base", tiny.decoder(), config=tiny.CONFIG | {"dtype": "float32"})
    report = lr.apply(base, [adapter], tmp_path / "out", dtype="float16")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "float16"
    assert {tensor.dtype for tensor in tensors_of(tmp_path / "out").values()} == {torch.float16}
    assert report.states["converted"] > 0


def test_dicts_in_memory(adapter):
    base = tiny.decoder()
    untouched = {name: tensor.clone() for name, tensor in base.items()}
    result = lr.apply(base, [(lr.open_adapter(adapter).adapter, 2.0)]).tensors
    assert all(torch.equal(base[name], untouched[name]) for name in base)
    for name, delta in deltas(adapter).items():
        torch.testing.assert_close(result[name].double(), base[name].double() + 2 * delta, rtol=1e-5, atol=1e-5)
    assert result[tiny.NORM] is base[tiny.NORM]


def test_a_pickled_base_comes_out_as_safetensors(adapter, tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "config.json").write_text(json.dumps(tiny.CONFIG))
    torch.save(tiny.decoder(), tmp_path / "base" / "pytorch_model.bin")
    lr.apply(tmp_path / "base", [adapter], tmp_path / "out")
    assert sorted(p.suffix for p in (tmp_path / "out").iterdir()) == [".json", ".json", ".md", ".safetensors"]
    wanted = lr.apply(tiny.decoder(), [adapter]).tensors
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(tmp_path / "out").items())


def test_a_picture_model_adapter_names_the_component_before_the_base_s_own_names():
    base = {"conv_in.weight": torch.randn(8, 4, 3, 3), "conv_in.bias": torch.randn(8)}
    delta = lr.LowRank(torch.randn(2, 36), torch.randn(8, 2), 0.5)
    weight = lr.AdaptedWeight(Kind.CONVOLUTION, delta, shape=(8, 4, 3, 3))
    result = lr.apply(base, [(lr.Adapter({"unet.conv_in.weight": weight}), -2.0)]).tensors
    wanted = base["conv_in.weight"] - 2 * delta.dense().reshape(8, 4, 3, 3)
    torch.testing.assert_close(result["conv_in.weight"], wanted, rtol=1e-5, atol=1e-5)


def test_only_tables_of_tokens_may_grow(model, tmp_path):
    odd = lora(tmp_path / "odd", {tiny.DOWN: tiny.decoder()[tiny.DOWN]}, modules_to_save=["q_proj"])
    tensors = load_file(odd / "adapter_model.safetensors")
    save_file(tensors | {tiny.PREFIX + Q0: torch.randn(30, tiny.HIDDEN)}, odd / "adapter_model.safetensors")
    tiny.refused("apply", model, odd, "-o", tmp_path / "out", code=1, words=(Q0, "[30, 24]", "[24, 24]"))


def test_a_grown_vocabulary_brings_its_tables_config_and_tokenizer(model, tmp_path):
    grown = lora(tmp_path / "grown", {Q0: tiny.decoder()[Q0]}, modules_to_save=["embed_tokens", "lm_head"])
    tensors = load_file(grown / "adapter_model.safetensors")
    for name in (tiny.TABLE, tiny.HEAD):
        tensors[tiny.PREFIX + name] = torch.randn(60, tiny.HIDDEN)
    save_file(tensors, grown / "adapter_model.safetensors")
    (model / "tokenizer.json").write_text("old")
    (grown / "tokenizer.json").write_text("new")
    lr.apply(model, [grown], tmp_path / "out")
    assert (tmp_path / "out" / "tokenizer.json").read_text() == "new"
    loaded = T.LlamaForCausalLM.from_pretrained(tmp_path / "out")
    assert loaded.config.vocab_size == 60
    assert torch.equal(loaded.state_dict()[tiny.TABLE], tensors[tiny.PREFIX + tiny.TABLE])
    with pytest.raises(LrmergeError, match="one adapter with weight 1"):
        lr.apply(model, [(grown, 0.5)])


def test_an_fp8_base_comes_out_dequantised(adapter, tmp_path):
    base = tiny.decoder()
    scaled = {}
    for name, tensor in base.items():
        if "_proj" in name:
            scaled[name] = tensor.to(torch.float8_e4m3fn)
            scaled[f"{name}_scale_inv"] = torch.full((1, 1), 2.0)
        else:
            scaled[name] = tensor
    tiny.save(tmp_path / "base", scaled, config=tiny.CONFIG | {"quantization_config": {"quant_method": "fp8"}})
    lr.apply(tmp_path / "base", [adapter], tmp_path / "out")
    result = tensors_of(tmp_path / "out")
    assert result.keys() == base.keys()
    wanted = scaled[Q0].double() * 2 + deltas(adapter)[Q0]
    torch.testing.assert_close(result[Q0].double(), wanted.to(torch.bfloat16).double(), rtol=8e-3, atol=1e-6)
    assert "quantization_config" not in json.loads((tmp_path / "out" / "config.json").read_text())


def test_the_plan_reads_headers_and_writes_nothing(model, adapter, tmp_path):
    outcome = tiny.lrmerge("apply", model, f"{adapter}:0.5", "-o", tmp_path / "out", "--dry-run", "--json")
    plan = json.loads(outcome.out)
    assert outcome.code == 0
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()
    assert {entry["name"] for entry in plan["tensors"]} == tiny.decoder().keys()
    assert plan["adapters"][0]["weight"] == 0.5
    assert plan["written_bytes"] == sum(tensor.nbytes for tensor in tiny.decoder().values())


def test_the_command_line_shows_changes_and_rounding(model, adapter, tmp_path):
    outcome = tiny.lrmerge("apply", model, f"{adapter}:0.5", adapter, "-o", tmp_path / "out")
    assert outcome.code == 0, outcome.err
    assert "rounding error" in outcome.out
    assert "tensors: 16 copied, 5 changed" in outcome.out
    for name, delta in deltas(adapter).items():
        moved = tensors_of(tmp_path / "out")[name].double() - tiny.decoder()[name].double()
        torch.testing.assert_close(moved, 1.5 * delta, rtol=1e-4, atol=1e-5)


# --- errors ---


def other_rank(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k: v[..., :7].contiguous() if k.endswith("A.weight") else v for k, v in tensors.items()},
              folder / "adapter_model.safetensors")  # fmt: skip


def other_names(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    save_file({k.replace("q_proj", "qkv"): v for k, v in tensors.items()}, folder / "adapter_model.safetensors")


def with_nan(folder: Path) -> None:
    tensors = load_file(folder / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = float("nan")
    save_file(tensors, folder / "adapter_model.safetensors")


@pytest.mark.parametrize(
    ("spoil", "words"), [(other_rank, ("shape",)), (other_names, ("qkv",)), (with_nan, ("NaN", "adapter"))]
)
def test_a_wrong_adapter_is_one_line(spoil, words, model, adapter, tmp_path):
    spoil(adapter)
    tiny.refused("apply", model, adapter, "-q", "-o", tmp_path / "out", code=1, words=words, out=tmp_path / "out")


def test_a_wrong_base_is_one_line(adapter, tmp_path):
    folder = VECTORS / "dora-gpt2" / "base"
    tiny.refused("apply", folder, adapter, "-o", tmp_path / "out", code=1, words=("adapter",), out=tmp_path / "out")
    wider = tiny.save(tmp_path / "wider", tiny.decoder(hidden=48))
    tiny.refused(
        "apply", wider, adapter, "-o", tmp_path / "out", code=1, words=("another model",), out=tmp_path / "out"
    )


def test_nan_in_the_base_is_named(adapter, tmp_path):
    tensors = tiny.decoder()
    tensors[Q0][1, 1] = float("nan")
    base = tiny.save(tmp_path / "base", tensors)
    words = ("model.safetensors", Q0, "NaN")
    tiny.refused("apply", base, adapter, "-q", "-o", tmp_path / "out", code=1, words=words, out=tmp_path / "out")


def test_what_float16_cannot_hold_is_refused(adapter, tmp_path):
    base = tiny.save(tmp_path / "base", {name: tensor * 1e6 for name, tensor in tiny.decoder().items()})
    tiny.refused(
        "apply", base, adapter, "-q", "-o", tmp_path / "out", "--dtype", "float16", code=1, words=("too large",)
    )


@pytest.mark.parametrize(
    ("tail", "code", "words"),
    [
        (":heavy", 2, ("heavy", "not a number")),
        (":nan", 2, ("finite",)),
        ("-missing", 1, ("no such",)),
    ],
)
def test_a_wrong_request_is_one_line(tail, code, words, model, adapter, tmp_path):
    tiny.refused(
        "apply", model, f"{adapter}{tail}", "-o", tmp_path / "out", code=code, words=words, out=tmp_path / "out"
    )


def test_an_existing_result_is_kept_unless_asked(model, adapter, tmp_path):
    out = tmp_path / "out"
    lr.apply(model, [adapter], out)
    before = tiny.contents(out)
    tiny.refused("apply", model, adapter, "-o", out, code=2, words=("--overwrite",))
    assert tiny.contents(out) == before
    lr.apply(model, [(adapter, 2.0)], out, overwrite=True)
    assert tiny.contents(out)["model.safetensors"] != before["model.safetensors"]
    tiny.refused("apply", model, adapter, "-o", model, "--overwrite", code=2, words=("input",))


def test_no_space_is_said_before_anything_is_written(model, adapter, tmp_path, monkeypatch):
    import shutil

    full = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: full)
    words = ("the disk has", "another output folder")
    tiny.refused("apply", model, adapter, "-o", tmp_path / "out", code=1, words=words, out=tmp_path / "out")


# --- killed, and in little memory ---


def test_ten_kills_and_the_same_bytes(tmp_path, monkeypatch):
    base = tiny.decoder(dtype=torch.bfloat16, hidden=240, layers=6)
    tiny.save(tmp_path / "base", base, shards=3)
    adapter, out = lora(tmp_path / "adapter", base), tmp_path / "out"
    lr.apply(tmp_path / "base", [(adapter, 0.8)], tmp_path / "whole", rounding="stochastic")
    chance = random.Random(0)
    given = f"{str(tmp_path / 'base')!r}, [({str(adapter)!r}, 0.8)], {str(out)!r}"
    process = forking(f'lr.apply({given}, resume=True, progress=step, rounding="stochastic")')
    journal, lengths = tmp_path / "out.partial" / "journal.jsonl", []
    for _ in range(10):
        assert killed(process, chance.randrange(1, 8), 0.03 * chance.random()) == signal.SIGKILL
        assert not out.exists()
        lengths.append(len(journal.read_bytes()))
    process.communicate()
    assert len(set(lengths)) > 5, "the kills did not land between batches"
    assert lengths == sorted(lengths), "a run began anew"
    left: list[int] = []
    monkeypatch.setattr(schedule, "BATCH_BYTES", 1 << 18)
    lr.apply(tmp_path / "base", [(adapter, 0.8)], out, resume=True, rounding="stochastic",
             progress=lambda progress: left.append(progress.total))  # fmt: skip
    assert left[0] < 0.9 * Checkpoint.open(tmp_path / "base").nbytes, "nothing was resumed"
    one, other = tiny.contents(out), tiny.contents(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name not in ("lrmerge.json", "README.md"))
    reports = [json.loads(files["lrmerge.json"])["changed"] for files in (one, other)]
    assert reports[0] == reports[1]


def test_another_request_does_not_continue_a_journal(model, adapter, tmp_path):
    out, calls = tmp_path / "out", []

    def stop(progress) -> None:
        calls.append(progress)
        if progress.done:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        lr.apply(model, [adapter], out, progress=stop)
    assert (tmp_path / "out.partial").exists()
    lr.apply(model, [(adapter, 0.25)], out, resume=True)
    wanted = lr.apply(model, [(adapter, 0.25)]).tensors
    assert all(torch.equal(tensor, wanted[name]) for name, tensor in tensors_of(out).items())


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """A model whose table alone is larger than the memory that there will be, and an adapter."""
    folder = tmp_path_factory.mktemp("large")
    base = tiny.decoder(dtype=torch.bfloat16, hidden=960, layers=1)
    base[tiny.TABLE] = torch.randn(1000, 960).bfloat16().repeat(62, 1)
    assert base[tiny.TABLE].nbytes > ROOM
    tiny.save(folder / "base", base)
    lora(folder / "adapter", base, scale=0.5)
    return folder


@pytest.mark.parametrize("limit", [in_a_group, with_a_limit])
def test_memory_does_not_grow_with_the_model(limit, large, tmp_path):
    base, adapter, out = str(large / "base"), str(large / "adapter"), str(tmp_path / "out")
    finish_within(limit, f"lr.apply({base!r}, [({adapter!r}, 0.8)], {out!r}, threads=1)")
    before, after = (tensors_of(folder)[tiny.TABLE][-1].double() for folder in (large / "base", tmp_path / "out"))
    wanted = before + 0.8 * deltas(large / "adapter")[tiny.TABLE][-1]
    torch.testing.assert_close(after, wanted, rtol=8e-3, atol=1e-4)
