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
from safetensors.torch import load_file, save_file
from tiny import CONFIG, NORM, TABLE, decoder, finetuned, refused, save
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
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


# --- what is no factors, with and without the base


def test_tensors_in_full_are_merged_as_differences_from_the_base_or_averaged(llama, tmp_path):
    model, folder = llama
    refs = [folder / "norm", folder / "norm2"]
    with_base = lr.merge(recipe(refs, "ties", base_model=str(folder / "base"), space="core"), tmp_path / "a")
    bare = lr.merge(recipe(refs, parameters={"weight": [{"value": 3.0}]}))
    assert any("averaged" in note for note in bare.notes)
    assert any(tensor.squared_norm == 0 for tensor in bare.tensors)
    assert not any("averaged" in note for note in with_base.notes)
    held = [lr.open_adapter(ref).adapter.saved for ref in refs]
    first, base = lr.open_adapter(tmp_path / "a").adapter.saved, model.state_dict()
    assert first.keys() == held[0].keys() == {"model.norm.weight", "lm_head.weight"}
    assert bare.adapter is not None
    for name in first:
        merged = lr.merge_tensors("ties", [own[name] for own in held], base=base[name])
        torch.testing.assert_close(first[name], merged, rtol=1e-5, atol=1e-6)
        torch.testing.assert_close(bare.adapter.saved[name], (held[0][name] + held[1][name]) / 2)
    in_peft(model, tmp_path / "a")


@pytest.mark.parametrize(
    ("names", "message"),
    [
        (["norm", "attention"], r"lm_head.weight: is saved in full in some adapters and not in .*attention; give a ba"),
        (["rows", "rows2"], r"embed_tokens.weight: .*rows.* does not train all of its token rows that others do; give"),
        (["dora", "attention"], r"_proj.weight: is with a DoRA magnitude in some adapters and not in .*; give a ba"),
        (["attention", "loha"], r"an adapter of type LOHA needs its base to be read; give base_model"),
    ],
)  # fmt: skip
def test_what_needs_the_base_says_so(llama, names, message):
    with pytest.raises(LrmergeError, match=message) as caught:
        lr.merge(recipe([llama[1] / name for name in names]))
    assert "\n" not in str(caught.value)


def test_doras_stay_doras_or_are_folded_into_what_they_do(llama, tmp_path):
    model, folder = llama
    names = ["dora", "dora2", "attention"]
    refs, base = [folder / name for name in names], str(folder / "base")
    kept = lr.merge(recipe(refs, base_model=base), tmp_path / "kept")
    assert any("DoRA magnitudes are merged apart" in note for note in kept.notes)
    in_peft(model, tmp_path / "kept")
    lengths = lr.open_adapter(tmp_path / "kept").adapter.weights["model.layers.0.mlp.down_proj.weight"].magnitude
    alone = lr.open_adapter(folder / "dora").adapter.weights["model.layers.0.mlp.down_proj.weight"].magnitude
    torch.testing.assert_close(lengths, alone)  # the others change nothing there
    with pytest.raises(LrmergeError, match=r"is of full rank, no adapter; give output\.rank"):
        lr.merge(recipe(refs, base_model=base, output={"dora": "fold"}))
    lr.merge(recipe(refs, base_model=base, output={"dora": "fold", "rank": 24}), tmp_path / "folded")
    lr.merge(recipe(refs, base_model=base, output={"kind": "model"}), tmp_path / "model")
    parts = differences(model, folder, names)
    wanted = {name: tensor.double() + sum(parts[name]) for name, tensor in model.state_dict().items()}
    close(weights_of(model, tmp_path / "folded"), wanted)
    close(load_file(tmp_path / "model" / "model.safetensors"), wanted)


def test_a_dora_beside_a_plain_lora_on_other_modules_stays_loadable(llama, tmp_path):
    model, folder = llama
    made = recipe([folder / "dora", folder / "attention"], base_model=str(folder / "base"))
    lr.merge(made, tmp_path / "out")
    name = "model.layers.1.self_attn.v_proj.weight"
    parts = differences(model, folder, ["attention"])
    torch.testing.assert_close(
        weights_of(model, tmp_path / "out")[name],
        model.state_dict()[name].double() + parts[name][0],
        rtol=1e-5,
        atol=1e-5,
    )
    in_peft(model, tmp_path / "out")


def test_biases_of_lora_layers_are_summed(tmp_path):
    adapters = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        delta = LowRank(torch.randn(2, 5), torch.randn(4, 2), 0.5 * seed)
        adapters.append(Adapter({"a.weight": AdaptedWeight(Kind.LINEAR, delta, (4, 5), bias=torch.randn(4))}))
    merged = lr.merge_adapters("task_arithmetic", adapters, weights=[1.0, 0.5]).weights["a.weight"]
    biases = [own.weights["a.weight"].bias * own.weights["a.weight"].delta.scaling for own in adapters]
    torch.testing.assert_close(merged.bias * merged.delta.scaling, biases[0] + 0.5 * biases[1])


# --- dialects and servers


@pytest.fixture(scope="module")
def unet(tmp_path_factory) -> tuple[Any, Path]:
    """A UNet of a few kilobytes, its folder, and two LoRAs on linear layers and convolutions of it."""
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
    model.save_pretrained(folder / "base")
    targets = (["to_q", "conv1"], ["to_q", "ff.net.0.proj", "conv2"])
    for seed, names in enumerate(targets):
        config = peft.LoraConfig(r=2 + seed, lora_alpha=3, target_modules=names)
        trained(folder / f"{seed}", model, config, seed)
    lr.convert(folder / "1", folder / "1.safetensors", to="kohya", base=folder / "base")
    return model, folder


def picture(model: Any) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return model(image, 3, text).sample


@pytest.mark.parametrize("to", ["diffusers", "kohya", "lycoris", "comfy", "peft"])
def test_adapters_of_two_dialects_merge_into_any(unet, tmp_path, to):
    model, folder = unet
    refs = [folder / "0", folder / "1.safetensors"]
    out = tmp_path / ("out" if to == "peft" else "out.safetensors")
    made = recipe(refs, base_model=str(folder / "base"), output={"format": to})
    if to == "comfy":
        with pytest.raises(LrmergeError):
            lr.merge(made, out)  # names of diffusers, not of the model's own code
        assert not list(tmp_path.iterdir())
        return
    report = lr.merge(made, out)
    assert (report.format, list(report.files)) == (to, [out.name if to != "peft" else "adapter_model.safetensors"])
    manifest = out / "lrmerge.json" if to == "peft" else out.with_suffix(".lrmerge.json")
    assert json.loads(manifest.read_text())["method"] == "task_arithmetic"
    loaded = copy.deepcopy(model)
    if to == "diffusers":
        loaded.load_lora_adapter(load_file(out), prefix="unet")
    else:
        again = lr.convert(out, tmp_path / "again", to="peft", base=folder / "base").out
        loaded = peft.PeftModel.from_pretrained(loaded, again)
    summed = copy.deepcopy(model)
    parts = [weights_of(model, folder / name) for name in ("0", "1")]
    base = {name: tensor.double() for name, tensor in model.state_dict().items()}
    summed.load_state_dict({name: parts[0][name] + parts[1][name] - base[name] for name in base})
    assert not torch.allclose(picture(summed), picture(model), atol=1e-3)
    torch.testing.assert_close(picture(loaded), picture(summed), rtol=1e-4, atol=1e-4)
    with pytest.raises(LrmergeError, match="exists already"):
        lr.merge(made, out)
    lr.merge(made, out, overwrite=True)


def test_a_target_gets_what_it_can_load(llama, tmp_path):
    model, folder = llama
    refs = [folder / "attention", folder / "patterns"]
    report = lr.merge(recipe(refs, "cat", output={"target": "vllm"}), tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"], config["rank_pattern"], config["alpha_pattern"]) == (8, 8, {}, {})
    assert report.target == "vllm"
    assert any("padded" in note for note in report.notes)
    parts = differences(model, folder, ["attention", "patterns"])
    wanted = {name: tensor.double() + sum(parts[name]) for name, tensor in model.state_dict().items()}
    close(weights_of(model, tmp_path / "out"), wanted)
    with pytest.raises(LrmergeError, match="vLLM loads no modules saved in full"):
        lr.merge(recipe([folder / "norm"], output={"target": "vllm"}), tmp_path / "no")
    assert not (tmp_path / "no").exists()


@pytest.mark.parametrize(
    ("output", "more", "words"),
    [
        ({"format": "kohia"}, {}, ("output.format", "kohya")),
        ({"target": "vllm", "format": "kohya"}, {}, ("output.target", "PEFT folders")),
        ({"dora": "fold"}, {}, ("output.dora", "base_model")),
        ({"kind": "model", "format": "peft"}, {}, ("output", "model")),
        ({"format": "kohya"}, {}, ("output.format", "choose peft")),
        ({}, {"merge_method": "arcee_fusion"}, ("merge_method", "BASE+ADAPTER")),
        ({}, {"merge_method": "ties"}, ("ties", "space: core", "output.rank")),
    ],
)
def test_recipes_that_cannot_be_are_refused_in_one_line(llama, tmp_path, output, more, words):
    made = recipe([llama[1] / "norm"], output=output) | more
    path, out = tmp_path / "r.yaml", tmp_path / "out.safetensors"
    path.write_text(json.dumps(made))
    refused("merge", path, out, "-q", code=2, words=words, out=out)


def test_a_damaged_adapter_is_named(llama, tmp_path):
    bad = tmp_path / "bad"
    bad.mkdir()
    (bad / "adapter_config.json").write_bytes((llama[1] / "attention" / "adapter_config.json").read_bytes())
    tensors = load_file(llama[1] / "attention" / "adapter_model.safetensors")
    next(iter(tensors.values()))[0, 0] = torch.inf
    save_file(tensors, bad / "adapter_model.safetensors")
    for space in ("full", "core", "knots"):
        with pytest.raises(LrmergeError, match=r"bad: model.layers.0.*_proj.weight holds NaN or Inf"):
            lr.merge(recipe([llama[1] / "attention", bad], space=space, output={"rank": 2}))


# --- models with LoRAs among models, and the API in memory


def test_a_model_with_an_adapter_merges_beside_models(llama, tmp_path):
    model, folder = llama
    tuned = save(tmp_path / "tuned", finetuned({n: t.clone() for n, t in model.state_dict().items()}), config=None)
    base = str(folder / "base")
    for adapter in ("dora", "norm", "rows", "vera"):
        made = {
            "version": 1, "merge_method": "ties", "base_model": base,
            "models": [{"model": f"{base}+{folder / adapter}"}, {"model": str(tuned)}],
        }  # fmt: skip
        found = lr.merge(made).result
        assert found is not None
        changed, other = weights_of(model, folder / adapter), load_file(tuned / "model.safetensors")
        for name, tensor in model.state_dict().items():
            inputs = [changed[name].float(), other[name]]
            merged = lr.merge_tensors("ties", inputs, base=tensor, vectors=tensor.ndim < 2)
            torch.testing.assert_close(found[name], merged, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize(
    ("method", "options"),
    [
        ("iso_c", {"scale": 0.7}),
        ("ties", {"weights": [1.0, 0.5], "density": (0.3, 0.6)}),
        ("dare_ties", {"density": 0.5}),
    ],
)
def test_state_dicts_merge_as_folders_do(tmp_path, method, options):
    base = decoder()
    models = [finetuned(base, seed=seed) for seed in (1, 2)]
    for name, tensors in zip(("base", "a", "b"), (base, *models), strict=True):
        save(tmp_path / name, tensors, config=CONFIG)
    before = [tensor.clone() for tensor in models[0].values()]
    found = lr.merge_state_dicts(method, base, models, seed=3, **options)
    made = {"version": 1, "merge_method": method, "base_model": str(tmp_path / "base"), "parameters": {}}
    made["models"] = [{"model": str(tmp_path / name), "parameters": {}} for name in "ab"]
    for key, value in options.items():
        for i, entry in enumerate(made["models"]):
            entry["parameters"] |= {key: value[i]} if isinstance(value, list | tuple) else {}
        made["parameters"] |= {} if isinstance(value, list | tuple) else {key: value}
    wanted = lr.merge(made, seed=3).result
    assert wanted is not None
    assert found.keys() == base.keys() == wanted.keys()
    assert all(torch.equal(found[name], wanted[name]) for name in base)
    assert all(torch.equal(old, new) for old, new in zip(before, models[0].values(), strict=True))


def test_state_dicts_without_a_base_and_wrong_ones():
    a, b = decoder(seed=1), decoder(seed=2)
    found = lr.merge_state_dicts("linear", None, [a, b], weights=[3.0, 1.0], dtype="bfloat16")
    torch.testing.assert_close(found[TABLE], (0.75 * a[TABLE] + 0.25 * b[TABLE]).bfloat16())
    for bad, message in (
        ({"method": "ties"}, "base_model is missing"),
        ({"method": "linear", "weights": [1.0]}, "has 1 values, expected one for each of 2 models"),
        ({"method": "linear", "wieghts": 1.0}, "did you mean 'weights'"),
        ({"method": "liner"}, "did you mean 'linear'"),
    ):
        with pytest.raises(LrmergeError, match=message):
            lr.merge_state_dicts(str(bad.pop("method")), None, [a, b], **bad)
    with pytest.raises(LrmergeError, match=f"model 1: has no tensor {NORM}"):
        lr.merge_state_dicts("linear", None, [a, {name: tensor for name, tensor in b.items() if name != NORM}])


def test_adapters_merge_in_memory_as_folders_do(llama, tmp_path):
    _, folder = llama
    refs = [folder / "attention", folder / "patterns"]
    held = [lr.open_adapter(ref).adapter for ref in refs]
    options = {"inner": "ties", "density": 0.5, "rank": 3, "weights": [1.0, 0.7]}
    found = lr.merge_adapters("core_space", held, **options)
    made = recipe(refs, "core_space", parameters={"inner": "ties", "density": 0.5, "rank": 3})
    made["adapters"][1]["parameters"] = {"weight": 0.7}
    made["adapters"][0]["parameters"] = {"weight": 1.0}
    wanted = lr.merge(made).adapter
    assert wanted is not None
    assert found.weights.keys() == wanted.weights.keys()
    for name, weight in found.weights.items():
        assert weight.delta.rank <= 3
        torch.testing.assert_close(weight.delta.dense(), wanted.weights[name].delta.dense())
    mixed = lr.merge_adapters("ties", [held[0], str(refs[1])], space="knots", base=folder / "base", dtype="bfloat16")
    assert {weight.delta.A.dtype for weight in mixed.weights.values()} == {torch.bfloat16}
    summed = lr.merge_adapters("task_arithmetic", held, rank=2)
    for name, weight in summed.weights.items():
        own = [adapter.weights[name].delta for adapter in held if name in adapter.weights]
        exact = own[0] if len(own) == 1 else own[0] + own[1]
        best = exact.truncate(2).delta.dense()
        torch.testing.assert_close(weight.delta.dense(), best, rtol=1e-4, atol=1e-5)
    with pytest.raises(LrmergeError, match="space: core"):
        lr.merge_adapters("ties", held)
