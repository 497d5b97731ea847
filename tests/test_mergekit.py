"""Every deterministic method that mergekit has too, with gradients, filters and slices: the same tensors as its own."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from tiny import decoder, finetuned, save
from torch import Tensor

import mergekit_lr as lr

DEEP = 4
FALLING, RISING = [0.9, 0.4, 0.2], [0, 0.3, 1]
FILTERED = [{"filter": "mlp", "value": [0.8, 0.3]}, {"filter": "self_attn", "value": 0.2}, {"value": 0.6}]
# Method, whether it has a base, parameters of each model, parameters of all.
METHODS: dict[str, tuple[str, bool, dict[str, Any], dict[str, Any]]] = {
    "linear": ("linear", False, {"weight": [FALLING, RISING]}, {}),
    "linear, filtered": ("linear", False, {"weight": [FILTERED, 0.5]}, {}),
    "linear, not normalized": ("linear", False, {"weight": [FALLING, 0.5]}, {"normalize": False}),
    "slerp": ("slerp", True, {}, {"t": [{"filter": "self_attn", "value": RISING}, {"value": FALLING}]}),
    "nuslerp": ("nuslerp", False, {"weight": [FALLING, FILTERED]}, {}),
    "nuslerp, by rows": ("nuslerp", False, {"weight": [0.3, 0.6]}, {"nuslerp_flatten": False}),
    "nuslerp, by columns": (
        "nuslerp",
        False,
        {"weight": [0.3, 0.6]},
        {"nuslerp_flatten": False, "nuslerp_row_wise": True},
    ),
    "nuslerp of deltas": ("nuslerp", True, {"weight": [0.3, 0.6]}, {}),
    "multislerp": ("multislerp", False, {"weight": [FALLING, FILTERED]}, {}),
    "multislerp of deltas": ("multislerp", True, {"weight": [0.3, 0.6]}, {}),
    "karcher": ("karcher", False, {}, {}),
    "model_stock": ("model_stock", True, {}, {}),
    "model_stock, by rows": ("model_stock", True, {}, {"filter_wise": True}),
    "task_arithmetic": ("task_arithmetic", True, {"weight": [FALLING, FILTERED]}, {"lambda": 0.7}),
    "ties": ("ties", True, {"weight": [FALLING, FILTERED], "density": [0.3, [0.9, 0.4]]}, {"lambda": 0.8}),
    "ties, by count": ("ties", True, {"weight": [0.4, 0.6], "density": [0.3, 0.5]}, {"normalize": False}),
    "breadcrumbs": ("breadcrumbs", True, {"weight": [0.4, RISING], "density": [0.6, 0.5], "gamma": [0.1, 0.1]}, {}),
    "breadcrumbs_ties": ("breadcrumbs_ties", True, {"weight": [0.4, 0.7], "density": [0.6, 0.5]}, {"gamma": 0.1}),
    "sce": ("sce", True, {}, {"select_topk": 0.4}),
    "ram": ("ram", True, {}, {}),
    "nearswap": ("nearswap", True, {}, {"t": 0.03}),
    "arcee_fusion": ("arcee_fusion", True, {}, {}),
    "passthrough": ("passthrough", False, {}, {"scale": [{"filter": "o_proj", "value": 0.5}, {"value": 1.0}]}),
}
SINGLE = ("passthrough", "nearswap", "arcee_fusion", "slerp")  # of one model, or one beside the base


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> dict[str, str]:
    """A base and two fine-tunes of it, four layers deep."""
    folder, base = tmp_path_factory.mktemp("models"), decoder(layers=DEEP)
    tensors = {"base": base, "one": finetuned(base, seed=1), "two": finetuned(base, seed=2)}
    config = json.loads((save(folder / "plain", base) / "config.json").read_text()) | {"num_hidden_layers": DEEP}
    return {name: str(save(folder / name, held, config=config)) for name, held in tensors.items()}


def given(models: dict[str, str], case: str) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """A recipe without its models, and the models with their parameters."""
    method, base, own, shared = METHODS[case]
    made: dict[str, Any] = {"merge_method": method, "dtype": "float32"}
    if base:
        made["base_model"] = models["base"]
    if shared:
        made["parameters"] = shared
    names = ["one"] if method in SINGLE else ["one", "two"]
    parameters = [{key: values[i] for key, values in own.items()} for i in range(len(names))]
    entries = [{"model": models[n], "parameters": p} for n, p in zip(names, parameters, strict=True)]
    return made, entries


def recipes(models: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Every case on whole models, and on slices: the last layers before the first, the base among the sources."""
    found = {}
    for case in METHODS:
        made, entries = given(models, case)
        found[case] = made | {"models": entries}
        if METHODS[case][1]:
            entries = [*entries, {"model": models["base"]}]
        ranges = ([2, 4], [0, 3])
        slices = [{"sources": [entry | {"layer_range": layers} for entry in entries]} for layers in ranges]
        found[f"{case}, slices"] = made | {"slices": slices}
    return found


def tensors_of(folder: Path) -> dict[str, Tensor]:
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def test_equals_mergekit(models, tmp_path):
    """In float32, run by mergekit's own environment."""
    if "LRMERGE_MERGEKIT" not in os.environ:
        pytest.skip("LRMERGE_MERGEKIT is not set: the path of mergekit-yaml in an environment that has mergekit")
    made = recipes(models)
    runs = [(recipe, str(tmp_path / case)) for case, recipe in made.items()]
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    python = Path(os.environ["LRMERGE_MERGEKIT"]).parent / "python"
    script = Path(__file__).with_name("merge_with_mergekit.py")
    done = subprocess.run([python, script, tmp_path / "runs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    worst = {case: difference(recipe, tmp_path / case) for case, recipe in made.items()}
    assert {case: error for case, error in worst.items() if error > 2e-5} == {}


def difference(recipe: dict[str, Any], theirs: Path) -> float:
    """The largest difference between our result and the one in ``theirs``, relative to the largest element."""
    found, wanted = lr.merge(recipe).result, tensors_of(theirs)
    assert found is not None
    assert found.keys() == wanted.keys()
    assert all(found[name].shape == wanted[name].shape for name in found)
    errors = [float((found[n] - wanted[n]).abs().max() / wanted[n].abs().max().clamp(min=1e-6)) for n in found]
    return max(errors) if all(bool(torch.isfinite(tensor).all()) for tensor in found.values()) else float("inf")
