"""Merging through the verb: what every method gives, slices, LoRAs, adapters, ties, kills, and mergekit's numbers."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import CONFIG, HEAD, LAYERS, NORM, TABLE, contents, decoder, finetuned, lrmerge, refused, save
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter import peft
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import LrmergeError
from mergekit_lr.methods.registry import Method, methods

METHODS = methods()
MODELS = ("base", "math", "code")
NEEDED = {"slerp": {"t": 0.3}, "nearswap": {"t": 0.02}, "svd": {"rank": 3}, "laser": {"keep": 0.5}}
QUERY = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """A base, two fine-tunes of it, and a LoRA of each."""
    folder = tmp_path_factory.mktemp("zoo")
    base = decoder()
    save(folder / "base", base, shards=2)
    for seed, name in enumerate(MODELS[1:], 1):
        tuned = finetuned(base, seed=seed)
        noise = torch.Generator().manual_seed(seed)
        vectors = {n: t + 0.02 * torch.randn(t.shape, generator=noise) for n, t in tuned.items() if t.dim() == 1}
        save(folder / name, tuned | vectors)
        low = save(folder / f"{name}-low", finetuned(base, rank=2, seed=seed))
        lr.extract(folder / "base", low, folder / f"{name}-lora", rank=2 + seed, embeddings="skip", rest="skip")
    (folder / "base" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"a": 0}}}))
    return folder


def loaded(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}


def recipe(zoo: Path, method: str, *, base: bool = True, models=MODELS[1:], parameters=None, **more) -> dict[str, Any]:
    """A recipe over the zoo's models; ``parameters`` holds for all of them."""
    made = {"version": 1, "merge_method": method, "models": [{"model": str(zoo / name)} for name in models], **more}
    if base:
        made["base_model"] = str(zoo / "base")
    return made | ({"parameters": parameters} if parameters else {})


def result(made: dict[str, Any], **options) -> dict[str, Tensor]:
    tensors = lr.merge(made, **options).result
    assert tensors is not None
    return tensors


def close(found: dict[str, Tensor], wanted: dict[str, Tensor], tolerance: float = 1e-5) -> None:
    assert found.keys() == wanted.keys()
    for name, tensor in wanted.items():
        assert found[name].dtype is tensor.dtype, name
        torch.testing.assert_close(
            found[name], tensor, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize("name", [n for n, m in METHODS.items() if m.takes != "factors"])
def test_every_method_gives_each_tensor_what_merge_tensors_gives(zoo, name):
    method, given = METHODS[name], NEEDED.get(name, {})
    count = 1 if method.models[1] == 1 else 2
    base = method.takes == "deltas" or method.base != "none"
    found = result(recipe(zoo, name, base=base, models=MODELS[1 : 1 + count], parameters=given), seed=5)
    held = [loaded(zoo / model) for model in MODELS]
    for tensor in held[0]:
        wanted = lr.merge_tensors(
            name,
            [model[tensor] for model in held[1 : 1 + count]],
            base=held[0][tensor] if base else None,
            name_of_tensor=tensor,
            seed=5,
            **given,
        )
        torch.testing.assert_close(found[tensor], wanted, rtol=1e-5, atol=1e-5, msg=lambda m, n=tensor: f"{n}: {m}")


def lora(zoo: Path, name: str) -> dict[str, LowRank]:
    return {n: weight.delta for n, weight in lr.open_adapter(zoo / f"{name}-lora").adapter.weights.items()}


def adapters(zoo: Path, method: str, parameters=None, **more) -> dict[str, Any]:
    given = [{"adapter": str(zoo / f"{name}-lora")} for name in MODELS[1:]]
    made = {"version": 1, "merge_method": method, "adapters": given, **more}
    return made | ({"parameters": parameters} if parameters else {})


def spaces_of(method: Method) -> list[str]:
    return [space for space in method.spaces if method.factored or space != "full"]


RUNS = [
    (n, s)
    for n, m in METHODS.items()
    if m.takes == "factors" or m.models[1] is None or m.factored
    for s in spaces_of(m)
]
RUNS = [(n, s) for n, s in RUNS if METHODS[n].models[1] != 1]


@pytest.mark.parametrize(("name", "space"), RUNS)
def test_every_method_merges_adapters_as_merge_tensors_does(zoo, name, space):
    given = NEEDED.get(name, {})
    if name in ("factor_average",):  # of one rank
        made = adapters(zoo, name, given, space=space)
        made["adapters"] = [made["adapters"][0]] * 2
        first = lora(zoo, "math")
        wanted = {n: [first[n], first[n]] for n in first}
    else:
        made = adapters(zoo, name, given, space=space)
        first, second = lora(zoo, "math"), lora(zoo, "code")
        wanted = {n: [first[n], second[n]] for n in first}
    report = lr.merge(made, seed=3)
    assert report.adapter is not None
    assert report.adapter.weights.keys() == wanted.keys()
    for tensor, deltas in wanted.items():
        dense = lr.merge_tensors(name, deltas, space=space, name_of_tensor=tensor, seed=3, **given)
        dense = dense.dense() if isinstance(dense, LowRank) else dense
        torch.testing.assert_close(report.adapter.weights[tensor].delta.dense(), dense, rtol=1e-4, atol=1e-5)


def test_core_space_with_a_linear_rule_is_task_arithmetic(zoo):
    weights = {"weights": [0.7, 0.3]}
    made = adapters(zoo, "task_arithmetic", space="core")
    for entry, weight in zip(made["adapters"], weights["weights"], strict=True):
        entry["parameters"] = {"weight": weight}
    merged = lr.merge(made).adapter
    assert merged is not None
    first, second = lora(zoo, "math"), lora(zoo, "code")
    for name, weight in merged.weights.items():
        dense = 0.7 * first[name].dense() + 0.3 * second[name].dense()
        torch.testing.assert_close(weight.delta.dense(), dense, rtol=1e-4, atol=1e-6)


def test_one_adapter_with_weight_one_is_that_adapter(zoo, tmp_path):
    made = adapters(zoo, "task_arithmetic", base_model=str(zoo / "base"))
    made["adapters"] = made["adapters"][:1]
    lr.merge(made, tmp_path / "out")
    merged, given = peft.open_peft(tmp_path / "out").weights, lora(zoo, "math")
    assert merged.keys() == given.keys()
    for name, weight in merged.items():
        torch.testing.assert_close(weight.delta.dense(), given[name].dense(), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("limit", [{"rank": 2}, {"energy": 0.9}, {"size": "8kB"}], ids=lambda limit: next(iter(limit)))
@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_a_limit_on_the_rank_cuts_the_merged_change(zoo, tmp_path, method, limit):
    report = lr.merge(adapters(zoo, method, output=limit), tmp_path / "out")
    first, second = lora(zoo, "math"), lora(zoo, "code")
    lost = whole = 0.0
    for name, weight in peft.open_peft(tmp_path / "out").weights.items():
        dense = lr.merge_tensors(method, [first[name], second[name]])
        dense = dense.dense() if isinstance(dense, LowRank) else dense
        lost, whole = lost + float((weight.delta.dense() - dense).square().sum()), whole + float(dense.square().sum())
        if "rank" in limit:
            assert weight.delta.rank <= 2
        if "energy" in limit:  # of each module, and with the least rank that keeps it
            kept = torch.linalg.svdvals(dense.double()).square().cumsum(0) / dense.double().square().sum()
            assert weight.delta.rank == int((kept < 0.9).sum()) + 1
    assert report.rounding_error == pytest.approx((lost / whole) ** 0.5, rel=0.02)
    if "energy" in limit:
        assert lost <= 0.1001 * whole
    if "size" in limit:
        assert report.files["adapter_model.safetensors"] < 12_000


@pytest.mark.parametrize("method", ["ties", "task_arithmetic"])
def test_adapters_merge_into_a_model(zoo, tmp_path, method):
    made = adapters(zoo, method, base_model=str(zoo / "base"), output={"kind": "model"})
    lr.merge(made, tmp_path / "out")
    base, found = loaded(zoo / "base"), loaded(tmp_path / "out")
    first, second = lora(zoo, "math"), lora(zoo, "code")
    for name, tensor in base.items():
        if name in first:
            delta = lr.merge_tensors(method, [first[name], second[name]])
            tensor = tensor + (delta.dense() if isinstance(delta, LowRank) else delta)
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6)
    manifest = json.loads((tmp_path / "out" / "lrmerge.json").read_text())
    assert manifest["verb"] == "merge"
    assert manifest["kind"] == "model"


def test_a_module_that_one_adapter_lacks_counts_as_no_change(zoo, tmp_path):
    lr.extract(zoo / "base", zoo / "code-low", tmp_path / "part", rank=2, include=["q_proj"], embeddings="skip")
    made = adapters(zoo, "task_arithmetic")
    made["adapters"][1]["adapter"] = str(tmp_path / "part")
    report = lr.merge(made)
    assert report.adapter is not None
    assert any("not in every adapter" in note for note in report.notes)
    first = lora(zoo, "math")
    for name, weight in report.adapter.weights.items():
        if "q_proj" not in name:
            torch.testing.assert_close(weight.delta.dense(), first[name].dense(), rtol=1e-5, atol=1e-6)


def test_a_model_with_a_lora_is_that_model_with_the_lora_in_it(zoo, tmp_path):
    lr.apply(zoo / "base", [(str(zoo / "math-lora"), 1.0)], tmp_path / "baked")
    made = recipe(zoo, "linear", base=False, models=["base"])
    plain = result(made | {"models": [{"model": str(tmp_path / "baked")}, {"model": str(zoo / "code")}]})
    lazy = result(made | {"models": [{"model": f"{zoo}/base+{zoo}/math-lora"}, {"model": str(zoo / "code")}]})
    close(lazy, plain, 1e-6)


def test_a_lora_leaves_the_dtype_of_its_model(zoo, tmp_path):
    narrow = {name: tensor.bfloat16() for name, tensor in loaded(zoo / "base").items()}
    save(tmp_path / "narrow", narrow, config=CONFIG | {"torch_dtype": "bfloat16"})
    made = {"version": 1, "merge_method": "linear"}
    report = lr.merge(
        made | {"models": [{"model": f"{tmp_path}/narrow+{zoo}/math-lora"}, {"model": str(zoo / "code")}]}
    )
    assert report.result is not None
    assert {tensor.dtype for tensor in report.result.values()} == {torch.bfloat16}
    assert report.config["torch_dtype"] == "bfloat16"


def test_slices_stack_layers(zoo, tmp_path):
    made = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(zoo / "math"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(zoo / "code"), "layer_range": [1, 2], "parameters": {"scale": 0.5}}]},
        ],
    }
    lr.merge(made, tmp_path / "out")
    found, math, code = loaded(tmp_path / "out"), loaded(zoo / "math"), loaded(zoo / "code")
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3
    assert torch.equal(found[TABLE], math[TABLE])
    assert torch.equal(found[NORM], 0.5 * code[NORM])  # of the last slice, with its parameters
    assert torch.equal(found["model.layers.1.mlp.up_proj.weight"], math["model.layers.1.mlp.up_proj.weight"])
    assert torch.equal(found["model.layers.2.mlp.up_proj.weight"], 0.5 * code["model.layers.1.mlp.up_proj.weight"])


def test_a_slice_may_have_its_own_base(zoo):
    sources = [{"model": str(zoo / "math"), "layer_range": [0, 1], "parameters": {"weight": 0.5}}]
    later = [one | {"layer_range": [1, 2]} for one in sources]
    slices = [{"sources": sources, "base_model": str(zoo / "code")}, {"sources": later}]
    made = {"merge_method": "task_arithmetic", "base_model": str(zoo / "base"), "slices": slices}
    found, (base, math, code) = result(made), (loaded(zoo / name) for name in MODELS)
    for layer, origin in enumerate((code, base)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        torch.testing.assert_close(found[name], (origin[name] + math[name]) / 2, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found[TABLE], (code[TABLE] + math[TABLE]) / 2, rtol=1e-6, atol=1e-6)
    del made["base_model"]  # the second slice has none
    with pytest.raises(LrmergeError, match="base_model is missing"):
        lr.merge(made)


def test_modules_are_merged_each_in_its_own_way(zoo):
    base, math, code = (loaded(zoo / name) for name in MODELS)
    models = [{"model": str(zoo / name)} for name in MODELS[1:]]
    gradient = {"scale": [{"filter": "up_proj", "value": [1.0, 0.5]}, {"value": 1.0}]}
    modules = {
        "mlp": {"models": models[:1], "parameters": gradient},
        "self_attn": {"slices": [{"sources": [{"model": str(zoo / "code"), "layer_range": [0, 2]}]}]},
        "default": {"models": models, "parameters": {"weight": 0.25}},
    }
    made = {"version": 1, "merge_method": "task_arithmetic", "base_model": str(zoo / "base"), "modules": modules}
    found = result(made | {"parameters": {"weight": 1.0}})
    wanted = {QUERY: code[QUERY], NORM: base[NORM] + 0.25 * (math[NORM] + code[NORM] - 2 * base[NORM])}
    for layer, scale in enumerate((1.0, 0.5)):
        name = f"model.layers.{layer}.mlp.up_proj.weight"
        wanted[name] = base[name] + scale * (math[name] - base[name])
    assert found.keys() == base.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-5)
    modules["self_attn"]["slices"][0]["sources"][0]["layer_range"] = [0, 1]
    with pytest.raises(LrmergeError, match="takes other layers"):
        lr.merge(made)


def test_gradients_run_over_layers_and_filters_over_names(zoo):
    made = recipe(zoo, "task_arithmetic", models=["math"])
    made["models"][0]["parameters"] = {"weight": [{"filter": "mlp", "value": [0.2, 0.8]}, {"value": 0.5}]}
    found, base, math = result(made), loaded(zoo / "base"), loaded(zoo / "math")
    for name, share in (
        ("model.layers.0.mlp.up_proj.weight", 0.2),
        ("model.layers.1.mlp.up_proj.weight", 0.8),
        (QUERY, 0.5),
        (NORM, 0.5),
    ):
        torch.testing.assert_close(found[name], base[name] + share * (math[name] - base[name]), rtol=1e-5, atol=1e-6)


def test_kernels_are_flat_and_experts_are_merged_one_by_one(tmp_path):
    made = torch.Generator().manual_seed(0)
    shapes = {"conv.weight": (4, 3, 3, 3), "experts.weight": (3, 6, 5), "step": (1,)}
    models = [{n: torch.randn(s, generator=made) for n, s in shapes.items()} for _ in range(3)]
    for i, model in enumerate(models):
        save(tmp_path / f"{i}", model | {"step": torch.tensor([i])}, config=None)
    ties = {"version": 1, "merge_method": "ties", "base_model": str(tmp_path / "0"), "parameters": {"density": 0.3}}
    found = result(ties | {"models": [{"model": str(tmp_path / f"{i}")} for i in (1, 2)]})
    assert found["step"].tolist() == [0]  # whole numbers are the base's
    base, *tuned = models
    for name, wanted in (
        ("conv.weight", lambda *t: [x.flatten(1) for x in t]),
        ("experts.weight", lambda *t: [x[1] for x in t]),
    ):
        origin, *given = wanted(base[name], *(model[name] for model in tuned))
        merged = lr.merge_tensors("ties", given, base=origin, density=0.3)
        torch.testing.assert_close(wanted(found[name])[0], merged, rtol=1e-5, atol=1e-6)


def test_targets_leave_the_rest_as_the_base_has_it(zoo):
    found = result(recipe(zoo, "linear", targets={"include": ["mlp"], "exclude": ["down"]}))
    base = loaded(zoo / "base")
    merged = {name for name in base if not torch.equal(found[name], base[name])}
    assert merged == {name for name in base if "mlp" in name and "down" not in name}


def test_dtype_is_rounded_to_once(zoo, tmp_path):
    lr.merge(recipe(zoo, "linear", base=False, dtype="bfloat16"), tmp_path / "out")
    exact, found = result(recipe(zoo, "linear", base=False)), loaded(tmp_path / "out")
    close(found, {name: tensor.bfloat16() for name, tensor in exact.items()}, 0)


def test_files_of_the_base_go_along_and_shards_are_its_own(zoo, tmp_path):
    report = lr.merge(recipe(zoo, "linear"), tmp_path / "out")
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert {"config.json", "tokenizer.json", "README.md", "lrmerge.json", "model.safetensors.index.json"} <= names
    assert set(report.files) == {path.name for path in (zoo / "base").glob("*.safetensors")}
    assert not any("partial" in name or "journal" in name for name in names)


def test_the_result_loads_in_transformers(zoo, tmp_path):
    from transformers import LlamaForCausalLM

    lr.merge(recipe(zoo, "linear", dtype="float32"), tmp_path / "out", shard_size="20kB")
    loading: Any = LlamaForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    model, info = loading
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    torch.testing.assert_close(model.state_dict()[QUERY], loaded(tmp_path / "out")[QUERY])


def test_tied_heads(zoo, tmp_path):
    """All tied: the head has no tensor. One untied: the others' table stands for it, and the result is untied."""
    tied = CONFIG | {"tie_word_embeddings": True}
    bare = {name: t for name, t in loaded(zoo / "base").items() if name != HEAD}
    a, b = (save(tmp_path / n, {k: t + 0.1 * i for k, t in bare.items()}, config=tied) for i, n in enumerate("ab"))
    made = {"merge_method": "linear", "models": [{"model": str(a)}, {"model": str(b)}], "parameters": {"weight": 1}}
    lr.merge(made, tmp_path / "tied")
    assert HEAD not in loaded(tmp_path / "tied")
    made["models"][1]["model"] = str(zoo / "code")
    lr.merge(made, tmp_path / "apart")
    found = loaded(tmp_path / "apart")
    torch.testing.assert_close(found[HEAD], (bare[TABLE] + loaded(zoo / "code")[HEAD]) / 2)
    assert json.loads((tmp_path / "apart" / "config.json").read_text())["tie_word_embeddings"] is False


def test_a_base_that_is_not_tied_keeps_its_head_when_the_models_are(zoo, tmp_path):
    bare = {name: t for name, t in loaded(zoo / "math").items() if name != HEAD}
    tied = save(tmp_path / "tied", bare, config=CONFIG | {"tie_word_embeddings": True})
    made = recipe(zoo, "task_arithmetic", models=["math"]) | {"models": [{"model": str(tied)}]}
    torch.testing.assert_close(result(made)[HEAD], bare[TABLE], rtol=1e-5, atol=1e-6)


class Killed(BaseException):
    """The process is gone: nothing is cleaned up."""


@pytest.mark.parametrize("kind", ["models", "adapters", "adapters into a model"])
def test_a_killed_run_resumes_to_the_same_bytes(zoo, tmp_path, kind):
    made = (
        recipe(zoo, "dare_ties", parameters={"density": 0.5})
        if kind == "models"
        else adapters(zoo, "ties", space="core")
    )
    if "into" in kind:
        made |= {"base_model": str(zoo / "base"), "output": {"kind": "model"}}
    steps = []
    lr.merge(made, tmp_path / "whole", progress=steps.append)
    whole = contents(tmp_path / "whole")
    for cut in (1, len(steps) // 2, len(steps) - 1):
        seen = []

        def kill(step, seen=seen, cut=cut):
            seen.append(step)
            if len(seen) > cut:
                raise Killed

        out = tmp_path / f"cut-{cut}"
        with pytest.raises(Killed):
            lr.merge(made, out, progress=kill)
        assert not out.exists()
        lr.merge(made, out, resume=True)
        again = contents(out)
        for name, data in whole.items():
            if name not in ("README.md", "lrmerge.json"):
                assert again[name] == data, name


def test_threads_change_no_bit(zoo):
    made = recipe(zoo, "della", parameters={"density": 0.5})
    one, two = result(made, threads=1), result(made, threads=2)
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_documents_build_on_each_other(zoo, tmp_path):
    first = recipe(zoo, "linear", base=False) | {"name": "half"}
    second = {"merge_method": "task_arithmetic", "base_model": str(zoo / "base"), "models": [{"model": "half"}]}
    second["parameters"] = {"weight": 2.0}
    (tmp_path / "two.yaml").write_text(yaml.safe_dump_all([first, second]))
    lr.merge(tmp_path / "two.yaml", tmp_path / "out")
    base, math, code = (loaded(zoo / name) for name in MODELS)
    found = loaded(tmp_path / "out")
    torch.testing.assert_close(found[QUERY], math[QUERY] + code[QUERY] - base[QUERY], rtol=1e-5, atol=1e-5)
    assert not (tmp_path / "out.parts").exists()
    half, last = json.loads(lrmerge("plan", tmp_path / "two.yaml", "--json").out)
    assert (half["method"], last["method"]) == ("linear", "task_arithmetic")
    assert last["models"] == [str(zoo / "base"), "half"]
    assert "half:" in lrmerge("merge", tmp_path / "two.yaml", "--dry-run").out


def test_nan_is_refused_by_name_and_nothing_is_left(zoo, tmp_path):
    bad = loaded(zoo / "math")
    bad[QUERY][0, 0] = float("nan")
    save(tmp_path / "bad", bad)
    (tmp_path / "r.yaml").write_text(
        yaml.safe_dump(recipe(zoo, "linear") | {"models": [{"model": str(tmp_path / "bad")}]})
    )
    refused("merge", tmp_path / "r.yaml", tmp_path / "out", "-q", code=1, words=(QUERY, "NaN"), out=tmp_path / "out")


def test_command_line(zoo, tmp_path):
    path = tmp_path / "ties.yaml"
    path.write_text(yaml.safe_dump(recipe(zoo, "ties", parameters={"density": 0.5})))
    plan = json.loads(lrmerge("plan", path, "--json").out)
    assert plan["states"] == {"merged": 9 * LAYERS + 3}
    assert lrmerge("merge", path, "--dry-run", "-v").out.count("ties(") == 9 * LAYERS + 3
    done = json.loads(lrmerge("merge", path, tmp_path / "out", "--json").out)
    assert done["states"] == plan["states"]
    assert done["written_bytes"] == plan["written_bytes"]
    refused("merge", path, code=2, words=("OUT",))
    refused("merge", path, tmp_path / "out", "-q", code=2, words=("--overwrite",))
    assert lrmerge("merge", path, "-o", tmp_path / "out", "--overwrite").code == 0
    listed = lrmerge("methods").out
    assert all(name in listed for name in METHODS)
    assert "density" in lrmerge("methods", "ties").out
    assert "merge_method" in json.loads(lrmerge("methods", "--schema").out)["properties"]
    refused("methods", "tys", code=2, words=("ties",))


WITH_MERGEKIT = {
    "linear": ("linear", False, {"weight": [0.3, 0.9]}, {}),
    "linear with a filter": ("linear", False, {"weight": [{"filter": "mlp", "value": 0.9}, {"value": 0.2}]}, {}),
    "slerp with a gradient": ("slerp", True, {}, {"t": [{"filter": "attn", "value": [0, 0.7]}, {"value": 0.4}]}),
    "task_arithmetic": ("task_arithmetic", True, {"weight": 0.6}, {"lambda": 0.8}),
    "ties": ("ties", True, {"weight": 0.6, "density": 0.4}, {"int8_mask": True}),
    "breadcrumbs": ("breadcrumbs", True, {"weight": 0.6, "density": 0.6, "gamma": 0.1}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", True, {"weight": 0.6, "density": 0.6, "gamma": 0.1}, {}),
    "model_stock": ("model_stock", True, {}, {}),
    "sce": ("sce", True, {}, {"select_topk": 0.5}),
    "nuslerp": ("nuslerp", False, {"weight": 0.5}, {}),
    "multislerp": ("multislerp", False, {"weight": 0.5}, {}),
    "karcher": ("karcher", False, {}, {}),
}


def test_equals_mergekit(zoo, tmp_path):
    """The same recipes in mergekit's own environment, in float32."""
    if "LRMERGE_MERGEKIT" not in os.environ:
        pytest.skip("LRMERGE_MERGEKIT is not set: the path of mergekit-yaml in an environment that has mergekit")
    python = Path(os.environ["LRMERGE_MERGEKIT"]).parent / "python"
    runs = []
    for name, (method, base, own, shared) in WITH_MERGEKIT.items():
        models = ["math"] if method == "slerp" else MODELS[1:]
        made = recipe(zoo, method, base=base, models=models, dtype="float32", parameters=shared)
        del made["version"]
        for entry in made["models"]:
            entry["parameters"] = own
        runs.append((made, str(tmp_path / name)))
    sources = [
        [{"model": str(zoo / "math"), "layer_range": [0, 2]}],
        [{"model": str(zoo / "code"), "layer_range": [0, 1]}],
    ]
    stack = {"merge_method": "passthrough", "dtype": "float32", "slices": [{"sources": s} for s in sources]}
    runs.append((stack, str(tmp_path / "stacked")))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("merge_with_mergekit.py")
    subprocess.run([python, script, tmp_path / "runs.json"], check=True, capture_output=True, text=True)
    for made, out in runs:
        close(result(made), loaded(Path(out)), 2e-5)
    stacked = json.loads((tmp_path / "stacked" / "config.json").read_text())
    assert stacked["num_hidden_layers"] == lr.merge(stack).config["num_hidden_layers"] == 3


def test_vocabularies_of_different_size_are_refused(zoo, tmp_path):
    small = {n: t[:40] if n in (TABLE, HEAD) else t for n, t in loaded(zoo / "math").items()}
    save(zoo / "small", small, config=CONFIG | {"vocab_size": 40})
    with pytest.raises(LrmergeError, match="vocabular"):
        lr.merge(recipe(zoo, "linear", base=False, models=["math", "small"]))
