"""Compression: the best approximation of every module, in the factors; everything else as it was; servers satisfied."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import compress as benchmark
import peft
import pytest
import torch
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st
from lrmerge.app import main
from safetensors import safe_open
from safetensors.torch import load_file, save_file

import mergekit_lr as lr
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.target import SERVERS
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError, LrmergeError, MismatchError, UsageError

SHAPE = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 32,
}
# Inside vLLM and SGLang: what a loader looks for in the keys and in the configuration.
VLLM_RANKS = {1, 8, 16, 32, 64, 128, 256, 320, 512}


def llama() -> transformers.LlamaForCausalLM:
    torch.manual_seed(0)
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**SHAPE))


def trained(folder: Path, *, rank: int = 8, true_rank: int = 8, model=None, **options) -> Path:
    """An adapter that PEFT saved, all of its tensors away from their initial values, deltas of ``true_rank``."""
    options = {"target_modules": ["q_proj", "v_proj", "down_proj"], "lora_alpha": 12} | options
    model = peft.get_peft_model(model or llama(), peft.LoraConfig(r=rank, **options))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if ("lora_B" in name or "lora_embedding_B" in name) and not name.endswith("bias"):
                rows, columns = parameter.shape
                parameter.copy_(torch.randn(rows, true_rank) @ torch.randn(true_rank, columns) / 10)
            elif parameter.requires_grad:
                parameter.add_(0.1 * torch.rand_like(parameter))
    model.save_pretrained(folder)
    return folder


def loaded(folder: Path, model=None) -> peft.PeftModel:
    """What the real PEFT makes of a folder; every key of the file must have a place in the model and back."""
    model = peft.PeftModel.from_pretrained(model or llama(), folder)
    result = peft.set_peft_model_state_dict(model, peft.utils.load_peft_weights(str(folder), device="cpu"))
    assert not result.unexpected_keys
    assert not [key for key in result.missing_keys if "lora_" in key]
    return model.eval()


def logits(model) -> torch.Tensor:
    with torch.no_grad():
        return model(torch.arange(12)[None]).logits


def dense(ref) -> dict[str, torch.Tensor]:
    adapter = ref if isinstance(ref, Adapter) else lr.open_adapter(ref).adapter
    return {name: weight.delta.to(torch.float64).dense() for name, weight in adapter.weights.items()}


def best(matrix: torch.Tensor, rank: int) -> torch.Tensor:
    U, S, Vh = torch.linalg.svd(matrix, full_matrices=False)
    return (U[..., :rank] * S[..., None, :rank]) @ Vh[..., :rank, :]


def run(*arguments: object, monkeypatch, capsys) -> tuple[int, str, str]:
    """Exit code, stdout and stderr of the command line."""
    monkeypatch.setattr(sys, "argv", ["lrmerge", *map(str, arguments)])
    try:
        main()
        code = 0
    except SystemExit as stop:
        code = int(stop.code or 0)
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def test_every_module_becomes_its_best_approximation(tmp_path):
    source = trained(tmp_path / "source")
    report = lr.compress(source, tmp_path / "out", rank=3)
    before, after = dense(source), dense(tmp_path / "out")
    for module in report.modules:
        wanted = best(before[module.name], 3)
        lost = (before[module.name] - wanted).norm() / before[module.name].norm()
        assert torch.allclose(after[module.name], wanted, atol=1e-6)
        assert module.error == pytest.approx(float(lost), rel=1e-5)
        assert (module.state, module.rank_before, module.rank) == ("compressed", 8, 3)
    total = sum(d.norm() ** 2 for d in before.values())
    lost = sum((before[n] - after[n]).norm() ** 2 for n in before)
    assert report.error == pytest.approx(float((lost / total).sqrt()), rel=1e-4)
    layer = loaded(tmp_path / "out").base_model.model.model.layers[1].mlp.down_proj
    assert torch.allclose(
        layer.get_delta_weight("default").double(), after["model.layers.1.mlp.down_proj.weight"], atol=1e-6
    )


def test_a_rank_not_below_the_true_one_loses_nothing(tmp_path):
    source = trained(tmp_path / "source", true_rank=3)
    report = lr.compress(source, tmp_path / "out", rank=3)
    assert report.error < 1e-6
    assert torch.allclose(logits(loaded(source)), logits(loaded(tmp_path / "out")), atol=1e-5)
    found = lr.compress(source, tmp_path / "found", error=0)
    assert {module.rank for module in found.modules} == {3}


def test_a_rank_above_the_dimensions_leaves_every_byte(tmp_path):
    source = trained(tmp_path / "source")
    report = lr.compress(source, tmp_path / "out", rank=1000)
    assert report.states == {"kept": 6}
    before, after = (load_file(folder / "adapter_model.safetensors") for folder in (source, tmp_path / "out"))
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)


@pytest.mark.parametrize("rule", [{"energy": 0.9}, {"error": 0.3}])
def test_the_least_rank_that_meets_the_target(tmp_path, rule):
    source = trained(tmp_path / "source")
    report = lr.compress(source, **rule)
    allowed = 0.1 if "energy" in rule else 0.09
    for module in report.modules:
        spectrum = torch.linalg.svdvals(dense(source)[module.name])
        tail = 1 - spectrum.square().cumsum(0) / spectrum.square().sum()
        assert module.rank == int((tail > allowed).sum()) + 1
        assert module.error**2 <= allowed


def test_budgets_hold_for_the_whole_file_and_buy_the_most(tmp_path):
    source = trained(tmp_path / "source", modules_to_save=["lm_head"])
    count = sum(tensor.numel() for tensor in load_file(source / "adapter_model.safetensors").values())
    report = lr.compress(source, tmp_path / "out", max_params=count * 2 // 3)
    kept = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert sum(tensor.numel() for tensor in kept.values()) <= count * 2 // 3
    smaller = lr.compress(source, size=count * 4 * 2 // 3)
    assert [m.rank for m in smaller.modules] == [m.rank for m in report.modules]
    uniform = lr.compress(source, rank=min(m.rank for m in report.modules))
    assert report.energy > uniform.energy
    loaded(tmp_path / "out")


def test_a_budget_that_is_too_small_says_what_is_fixed(tmp_path):
    source = trained(tmp_path / "source", modules_to_save=["lm_head"])
    with pytest.raises(UsageError, match=r"--max-params 100: what is not compressed takes 512 numbers alone"):
        lr.compress(source, tmp_path / "out", max_params=100)
    assert not (tmp_path / "out").exists()


def test_patterns_choose_what_is_compressed_and_how_far(tmp_path):
    source = trained(tmp_path / "source")
    report = lr.compress(source, tmp_path / "out", rank=4, exclude=["layers.0"], rank_pattern={"down_proj": 2})
    ranks = {m.name: (m.rank, m.state) for m in report.modules}
    assert ranks["model.layers.0.mlp.down_proj.weight"] == (8, "kept")
    assert ranks["model.layers.1.mlp.down_proj.weight"] == (2, "compressed")
    assert ranks["model.layers.1.self_attn.q_proj.weight"] == (4, "compressed")
    after = dense(tmp_path / "out")
    layer = loaded(tmp_path / "out").base_model.model.model.layers[0].self_attn.v_proj
    assert torch.allclose(
        layer.get_delta_weight("default").double(), after["model.layers.0.self_attn.v_proj.weight"], atol=1e-6
    )


@pytest.mark.parametrize(
    "options",
    [
        {"use_dora": True},
        {"lora_bias": True, "use_rslora": True},
        {"modules_to_save": ["lm_head"], "rank_pattern": {"q_proj": 4}, "alpha_pattern": {"v_proj": 3}},
        {"target_modules": ["q_proj", "embed_tokens"]},
        {"trainable_token_indices": [1, 5]},
    ],
    ids=["dora", "lora_bias", "saved", "embedding", "tokens"],
)
def test_what_stands_beside_the_factors_stays_exact(tmp_path, options):
    source = trained(tmp_path / "source", true_rank=2, **options)
    report = lr.compress(source, tmp_path / "out", rank=2)
    assert report.total_rank < report.rank_before
    wanted, got = logits(loaded(source)), logits(loaded(tmp_path / "out"))
    assert not torch.allclose(wanted, logits(llama()), atol=1e-2)
    assert torch.allclose(wanted, got, atol=2e-5)
    beside = {other.part for other in report.others}
    expected = {"use_dora": "magnitude", "lora_bias": "bias", "modules_to_save": "saved"}
    expected["trainable_token_indices"] = "token rows"
    assert all(part in beside for option, part in expected.items() if option in options)


def test_a_dora_is_told_what_its_error_means(tmp_path):
    report = lr.compress(trained(tmp_path / "source", use_dora=True), rank=2)
    assert any("magnitudes stay" in note for note in report.notes)


def test_rounding_to_bfloat16_is_what_the_report_says(tmp_path):
    source = trained(tmp_path / "source", true_rank=3)
    report = lr.compress(source, tmp_path / "out", rank=3, dtype="bfloat16")
    before, after = dense(source), dense(tmp_path / "out")
    error = sum((before[n] - after[n]).norm() ** 2 for n in before) / sum(d.norm() ** 2 for d in before.values())
    assert float(error.sqrt()) == pytest.approx(report.rounding, rel=0.25)
    stored = load_file(tmp_path / "out" / "adapter_model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}


@settings(max_examples=25, deadline=None)
@given(
    experts=st.integers(0, 3), rank=st.integers(1, 5), first=st.integers(1, 6), second=st.integers(1, 6),
    seed=st.integers(0, 99),
)  # fmt: skip
def test_compressing_twice_is_compressing_once(experts, rank, first, second, seed):
    generator = torch.Generator().manual_seed(seed)
    lead = (experts,) if experts else ()
    delta = LowRank(
        torch.randn(*lead, rank, 7, generator=generator), torch.randn(*lead, 5, rank, generator=generator), -1.5
    )
    kind = Kind.EXPERTS if experts else Kind.LINEAR
    adapter = Adapter({"m.experts.down_proj" if experts else "m.weight": AdaptedWeight(kind, delta)})
    once = lr.compress(adapter, rank=min(first, second)).adapter
    twice = lr.compress(lr.compress(adapter, rank=first).adapter, rank=second).adapter
    for one, two in zip(dense(once).values(), dense(twice).values(), strict=True):
        assert torch.allclose(one, two, atol=1e-5)
        assert torch.allclose(one, best(delta.to(torch.float64).dense(), min(first, second)), atol=1e-5)


def test_experts_of_a_stack_share_the_rank_of_the_neediest(tmp_path):
    A, B = torch.randn(3, 6, 9), torch.randn(3, 8, 6)
    B[0, :, 1:] = 0
    adapter = Adapter({"m.experts.down_proj": AdaptedWeight(Kind.EXPERTS, LowRank(A, B))})
    report = lr.compress(adapter, error=0.4)
    assert 1 < report.modules[0].rank < 6
    assert report.modules[0].error <= 0.4


def test_an_untrained_module_is_dropped_and_counted(tmp_path):
    zero = LowRank(torch.randn(4, 6), torch.zeros(5, 4))
    full = LowRank(torch.randn(4, 6), torch.randn(5, 4))
    adapter = Adapter({"a.weight": AdaptedWeight(Kind.LINEAR, zero), "b.weight": AdaptedWeight(Kind.LINEAR, full)})
    report = lr.compress(adapter, tmp_path / "out", error=0.5)
    assert (report.modules[0].state, report.modules[0].reason) == ("dropped", "its change is zero")
    assert list(dense(tmp_path / "out")) == ["b.weight"]


def kohya_file(path: Path, *, alpha: bool = True, scale: float = 1.0) -> Path:
    torch.manual_seed(0)
    tensors = {}
    for name in ("down_blocks_0_attentions_0_proj_in", "mid_block_attentions_0_proj_out"):
        tensors[f"lora_unet_{name}.lora_down.weight"] = torch.randn(8, 16) * scale
        tensors[f"lora_unet_{name}.lora_up.weight"] = torch.randn(12, 8)
        if alpha:
            tensors[f"lora_unet_{name}.alpha"] = torch.tensor(4.0)
    save_file(tensors, path, {"ss_network_dim": "8", "ss_tag_frequency": "{}", "modelspec.title": "x"})
    return path


@pytest.mark.parametrize("alpha", [True, False], ids=["alpha", "no alpha"])
def test_a_kohya_file_stays_one(tmp_path, alpha):
    source = kohya_file(tmp_path / "a.safetensors", alpha=alpha)
    report = lr.compress(source, tmp_path / "b.safetensors", rank=2)
    assert (report.dialect, report.to) == ("kohya", "kohya")
    before, after = dense(source), dense(tmp_path / "b.safetensors")
    assert all(torch.allclose(after[name], best(before[name], 2), atol=1e-5) for name in before)
    with safe_open(tmp_path / "b.safetensors", "pt") as file:
        facts = file.metadata()
    assert (facts["ss_network_dim"], facts["ss_tag_frequency"], facts["modelspec.title"]) == ("2", "{}", "x")
    assert json.loads((tmp_path / "b.lrmerge.json").read_text())["totals"]["total_rank"] == 4


# --- servers


def check_server(folder: Path, server: str) -> None:
    """The rules by which vLLM, SGLang and TensorRT-LLM accept an adapter, as far as the folder shows them."""
    config = json.loads((folder / "adapter_config.json").read_text())
    rank = config["r"]
    if server == "vllm":
        assert rank in VLLM_RANKS
    assert config["lora_alpha"] == rank
    assert config["modules_to_save"] is None
    assert config["bias"] == "none"
    assert not any(config[key] for key in ("use_dora", "use_rslora", "lora_bias", "rank_pattern", "alpha_pattern"))
    assert not config["target_parameters"]
    assert config["task_type"] == "CAUSAL_LM"
    assert all("." not in name for name in config["target_modules"])
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        assert key.startswith("base_model.model.")
        module, _, part = key.removesuffix(".weight").rpartition(".")
        assert part in ("lora_A", "lora_B")
        assert module.rpartition(".")[2] in config["target_modules"]
        assert tensor.shape[0 if part == "lora_A" else 1] == rank
        assert "base_layer" not in module


@pytest.mark.parametrize("server", SERVERS)
def test_servers_get_one_rank_and_one_scale(tmp_path, server):
    patterns = {"rank_pattern": {"q_proj": 5}, "alpha_pattern": {"v_proj": 3}, "use_rslora": True}
    source = trained(tmp_path / "source", **patterns)
    lr.compress(source, tmp_path / "same", target=server)
    check_server(tmp_path / "same", server)
    assert torch.allclose(logits(loaded(source)), logits(loaded(tmp_path / "same")), atol=1e-5)
    report = lr.compress(source, tmp_path / "out", energy=0.8, target=server)
    check_server(tmp_path / "out", server)
    compressed = dense(lr.compress(source, energy=0.8).adapter)
    assert all(torch.allclose(d, compressed[n], atol=1e-6) for n, d in dense(tmp_path / "out").items())
    assert any("padded with zeros" in note for note in report.notes)


def test_servers_get_experts_one_by_one(tmp_path):
    settings = {"num_experts": 3, "num_experts_per_tok": 1, "moe_intermediate_size": 8, "head_dim": 8}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**SHAPE | settings))
    model.save_pretrained(tmp_path / "base")
    names = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    source = trained(tmp_path / "source", model=model, target_modules=["q_proj"], target_parameters=names)
    lr.compress(source, tmp_path / "out", rank=4, target="vllm", base=tmp_path / "base")
    check_server(tmp_path / "out", "vllm")
    single, whole = dense(tmp_path / "out"), dense(lr.compress(source, rank=4).adapter)
    stack = whole["model.layers.1.mlp.experts.gate_up_proj"]
    gate, up = (single[f"model.layers.1.mlp.experts.2.{part}_proj.weight"] for part in ("gate", "up"))
    assert torch.allclose(torch.cat([gate, up]), stack[2], atol=1e-6)
    assert torch.allclose(
        single["model.layers.0.mlp.experts.1.down_proj.weight"], whole["model.layers.0.mlp.experts.down_proj"][1],
        atol=1e-6,
    )  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "vLLM loads no DoRA; fold it"),
        ({"lora_bias": True}, "vLLM loads no biases"),
        ({"modules_to_save": ["lm_head"]}, "lm_head.weight: vLLM loads no modules saved in full"),
        ({"target_modules": ["embed_tokens"]}, "this is a weight of kind embedding"),
        ({"trainable_token_indices": [1]}, "no trained token rows"),
    ],
)
def test_what_a_server_cannot_do_is_refused_by_name(tmp_path, options, message):
    source = trained(tmp_path / "source", **options)
    with pytest.raises(MismatchError, match=message):
        lr.compress(source, tmp_path / "out", rank=2, target="vllm")
    assert not (tmp_path / "out").exists()
    assert not (tmp_path / "out.partial").exists()


def test_more_rank_than_a_server_has(tmp_path):
    wide = LowRank(torch.randn(513, 600), torch.randn(600, 513))
    adapter = Adapter({"a.weight": AdaptedWeight(Kind.LINEAR, wide)})
    with pytest.raises(MismatchError, match="rank 513, vLLM loads 512 at most; compress it with --max-rank 512"):
        lr.compress(adapter, target="vllm")


def test_the_peers_of_the_benchmark_reach_the_optimum():
    adapter = benchmark.make_adapter(24, 40, 1, 8)
    for row in benchmark.per_module(adapter, 3, 1, 1):
        assert all(abs(row[f"{name} excess"]) < 1e-6 for name in ("lrmerge", "PEFT", "kohya"))
    delta = adapter.weights["model.layers.0.mlp.down_proj.weight"].delta
    assert benchmark.excess(delta, *benchmark.by_peft(delta.B, delta.A, 2), 3) > 0.01


# --- bad input


def damaged(source: Path, change) -> Path:
    file = source / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    return source


def first(tensors: dict, part: str) -> str:
    return next(key for key in tensors if part in key)


def test_an_adapter_without_factors(tmp_path):
    source = damaged(trained(tmp_path / "s", modules_to_save=["lm_head"]), only_saved)
    with pytest.raises(UsageError, match="holds no low-rank factors"):
        lr.compress(source, rank=2, include=["q_proj"])


def only_saved(tensors: dict) -> None:
    for key in [key for key in tensors if "lora_" in key]:
        del tensors[key]


def test_nan_is_named(tmp_path):
    source = damaged(trained(tmp_path / "s"), lambda t: t[first(t, "lora_B")].fill_(float("nan")))
    with pytest.raises(FormatError, match=r"down_proj\.weight: factor B holds NaN or Inf"):
        lr.compress(source, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    "change",
    [lambda t: t.update({"base_model.model.lora_C.weight": torch.ones(1)}) or t.pop(first(t, "lora_A")),
     lambda t: t.pop(first(t, "lora_B"))],
    ids=["unknown key", "missing factor"],
)  # fmt: skip
def test_keys_that_do_not_fit(tmp_path, change):
    source = damaged(trained(tmp_path / "s"), change)
    with pytest.raises(FormatError):
        lr.compress(source, tmp_path / "out", rank=2)
    assert not (tmp_path / "out").exists()


def test_mixed_dialects(tmp_path):
    tensors = load_file(kohya_file(tmp_path / "a.safetensors"))
    tensors["unet.mid_block.attentions.0.proj_in.lora_A.weight"] = torch.ones(2, 3)
    save_file(tensors, tmp_path / "mixed.safetensors")
    with pytest.raises(FormatError, match="mixes dialects"):
        lr.compress(tmp_path / "mixed.safetensors", tmp_path / "out.safetensors", rank=2)


def test_factors_of_a_residual_base_are_refused(tmp_path):
    source = trained(tmp_path / "source")
    config = json.loads((source / "adapter_config.json").read_text())
    (source / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": "corda"}))
    with pytest.raises(FormatError, match="init_lora_weights is corda"):
        lr.compress(source, tmp_path / "out", rank=2)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "how far to compress"),
        (["--rank", "auto"], "no rounding noise"),
        (["--rank", "0"], "--rank 0: a number from 1"),
        (["--rank", "2", "--energy", "0.9"], "--rank and --energy both choose the rank"),
        (["--energy", "1.5"], "energy must be between 0 and 1"),
        (["--rank", "2", "--include", "nowhere"], "--include 'nowhere' matches no module"),
        (["--rank", "2", "--include", "("], "is no regular expression"),
        (["--rank", "2", "--rank-pattern", "q_proj"], "write REGEX=N"),
        (["--rank", "2", "--dtype", "int8"], "--dtype int8: choose float32"),
        (["--rank", "2", "--to", "kohya"], "a kohya adapter is one file|in no known part of an image model"),
        (["--rank", "2", "--target", "vllm", "--to", "kohya"], "--target vllm reads PEFT folders"),
    ],
)
def test_a_wrong_request_is_one_line_and_writes_nothing(tmp_path, monkeypatch, capsys, options, message):
    source, out = trained(tmp_path / "source"), tmp_path / "out"
    code, shown, said = run(
        "compress", source, "-o", out, *options, "-q", monkeypatch=monkeypatch, capsys=capsys
    )  # fmt: skip
    assert (code, shown, said.count("\n")) == (2, "", 1)
    assert said.startswith("error: ")

    assert re.search(message, said)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["source"]


def test_an_existing_result_is_replaced_only_when_asked(tmp_path, monkeypatch, capsys):
    source, out = trained(tmp_path / "source"), tmp_path / "out"
    assert run("compress", source, "-o", out, "--rank", 3, monkeypatch=monkeypatch, capsys=capsys)[0] == 0
    before = (out / "adapter_model.safetensors").read_bytes()
    code, _, said = run("compress", source, "-o", out, "--rank", 2, "-q", monkeypatch=monkeypatch, capsys=capsys)
    assert (code, said.count("\n")) == (2, 1)
    assert "exists already" in said
    assert (out / "adapter_model.safetensors").read_bytes() == before
    code, shown, _ = run(
        "compress", source, "-o", out, "--rank", 2, "--overwrite", "--json", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert json.loads(shown)["totals"]["total_rank"] == 12
    manifest = json.loads((out / "lrmerge.json").read_text())
    assert (manifest["verb"], manifest["options"]["rank"]) == ("compress", 2)
    assert manifest["inputs"]["adapter"]["files"][0]["file"] == "adapter_model.safetensors"
    assert "LoRA-Squeeze" in (out / "README.md").read_text()
    with pytest.raises(UsageError, match="input of this run"):
        lr.compress(out, out, rank=1, overwrite=True)


def test_the_table_and_the_plan_say_what_happens(tmp_path, monkeypatch, capsys):
    source = trained(tmp_path / "source", modules_to_save=["lm_head"])
    code, shown, _ = run(
        "compress", source, "-o", tmp_path / "out", "--rank", 2, "--dry-run", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert "compress: 6 linear modules of rank 8" in shown
    assert not (tmp_path / "out").exists()
    code, shown, _ = run(
        "compress", source, "-o", tmp_path / "out", "--rank", 2, "-v", monkeypatch=monkeypatch, capsys=capsys
    )
    assert code == 0
    assert "8 -> 2" in shown
    assert "kept saved lm_head.weight" in shown


def test_nothing_but_our_errors_leaves_the_api(tmp_path):
    with pytest.raises(LrmergeError):
        lr.compress(tmp_path / "nowhere", tmp_path / "out", rank=2)
