"""Adapters of every type against what others make of them: merged weights, weighted combinations, extractions.

Cases come from the folder that LRMERGE_VECTORS names, else from tests/vectors and from ``shared/vectors`` beside the
checkout where that exists. Every tensor of the merged model is compared, changed or not.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft import open_peft
from mergekit_lr.adapter.variants import open_variant
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.residual import method_of
from mergekit_lr.adapter.variants.site import as_matrix, from_matrix
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import Layout, parameters
from mergekit_lr.checkpoint.pair import read_whole
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError

HERE = Path(__file__).resolve()
FOLDERS = (
    [Path(os.environ["LRMERGE_VECTORS"])]
    if "LRMERGE_VECTORS" in os.environ
    else [HERE.parents[1] / "vectors", HERE.parents[3] / "shared" / "vectors"]
)

# What cannot be said as changes of the base's weights, and what the refusal says.
REFUSED = {"lora-llama-layer-replication": "layer_replication is set"}
RAN: Counter[str] = Counter()


def cases(kind: str, depth: int) -> dict[str, Path]:
    """Case folders by name; a folder given later fills up what an earlier one does not have."""
    found: dict[str, Path] = {}
    for folder in FOLDERS:
        for file in sorted((folder / kind).glob("*/" * depth + "case.json")):
            found.setdefault("/".join(file.parent.parts[-depth:]), file.parent)
    return found


MERGED = cases("peft", 1)
COMBINED = cases("peft_weighted", 2)
EXTRACTED = cases("extract", 2)


@pytest.mark.parametrize("case", MERGED)
def test_merged_weights(case: str):
    """Base plus delta is what PEFT merges, for every tensor of the model."""
    folder = MERGED[case]
    facts = json.loads((folder / "case.json").read_text())
    base, layout = open_base(folder / "base")
    if case in REFUSED:
        with pytest.raises(FormatError, match=REFUSED[case]):
            open_adapter(folder / "adapter", base, layout)
        RAN[f"refused: {case} ({REFUSED[case]})"] += 1
        return
    adapter = open_adapter(folder / "adapter", base, layout)
    merged = load_file(folder / "merged" / "model.safetensors")
    changed = changes(adapter, base, layout)
    assert changed, "the adapter changes nothing"
    for name, parameter in layout.by_name.items():
        source = name if name in changed else layout.ties.get(name, name)
        weight = read_whole(base, parameter)
        ours = changed.get(source, weight.float()).to(weight.dtype)
        torch.testing.assert_close(
            ours, merged.pop(name), **facts["tolerance"], msg=lambda text, name=name: f"{name}: {text}"
        )
    buffers = {name for name in merged if "running_" in name or "num_batches" in name}
    assert not merged.keys() - buffers, "the merged model has parameters that the layout does not know"
    RAN[facts["peft_type"]] += 1


@pytest.mark.parametrize("case", COMBINED)
def test_weighted_combination(case: str):
    """PEFT's cat is our sum of deltas, its svd our truncated sum; all else is as far from it as PEFT says."""
    folder = COMBINED[case]
    facts = json.loads((folder / "case.json").read_text())
    _, layout = open_base(folder.parent / "base")
    arguments = facts["arguments"]
    adapters = {name: open_peft(folder.parent / name, layout=layout) for name in arguments["adapters"]}
    total = weighted_sum(adapters, dict(zip(arguments["adapters"], arguments["weights"], strict=True)))
    if "error" in facts:  # PEFT cannot; the sum of deltas can all the same, whatever the ranks
        assert all(weight.delta.norm().isfinite() for weight in total.values())
        RAN["combination that PEFT refuses"] += 1
        return
    result = load_file(folder / "result.safetensors")
    for module, factor in facts["scaling_of_result"].items():
        name = f"{module}.weight"
        weight, theirs = total[name], result[f"delta/{module}"]
        exact = own_layout(weight, weight.delta)
        distance = (theirs - exact).norm() / exact.norm()
        stated = facts["relative_distance_to_weighted_sum_of_deltas"][module]
        assert float(distance) == pytest.approx(stated, abs=2e-5)
        # rsLoRA: PEFT's result is wrong by its own scaling; A and B hold what was meant.
        intended = theirs / factor
        kind = arguments["combination_type"]
        if kind == "cat":
            torch.testing.assert_close(exact, intended, **facts["tolerance"])
            for adapter in arguments["adapters"]:
                if name in adapters[adapter].weights:
                    single = adapters[adapter].weights[name]
                    torch.testing.assert_close(
                        own_layout(single, single.delta), result[f"delta_in/{adapter}/{module}"], **facts["tolerance"]
                    )
        elif kind == "svd" and "svd_clamp" not in arguments:
            rank = facts["result_config"]["r"]
            kept = own_layout(weight, weight.delta.truncate(rank).delta)
            torch.testing.assert_close(kept, intended, rtol=1e-3, atol=1e-4 * float(exact.abs().max()))
    RAN[f"combination {arguments['combination_type']}"] += 1


@pytest.mark.parametrize("case", EXTRACTED)
def test_extracted_adapter(case: str):
    """Adapters that another extractor wrote, its rank_pattern included: the same products, the same merged weights.

    Its biases are left out: it writes them without ``lora_bias``, so PEFT drops them and ``merged`` lacks them.
    """
    folder = EXTRACTED[case]
    base, layout = open_base(folder.parent / "base")
    adapter = open_peft(folder / "adapter", layout=layout)
    tolerance = json.loads((folder / "case.json").read_text())["tolerance"]
    products = load_file(folder / "products.safetensors")
    for name, weight in adapter.weights.items():
        product = products.pop(f"delta/base_model.model.{name.removesuffix('.weight')}")
        torch.testing.assert_close(own_layout(weight, weight.delta), product, **tolerance)
    assert not products
    merged = load_file(folder / "merged" / "model.safetensors")
    for name, tensor in changes(adapter, base, layout).items():
        if not name.endswith(".bias"):
            torch.testing.assert_close(tensor.to(merged[name].dtype), merged[name], **tolerance)
    RAN["extracted"] += 1


def test_some_ran():
    """The folders were found; what ran is printed (pytest -rP shows it)."""
    assert MERGED, f"no cases under {', '.join(map(str, FOLDERS))}"
    assert COMBINED or EXTRACTED, f"no combinations under {', '.join(map(str, FOLDERS))}"
    for kind, count in sorted(RAN.items()):
        print(f"{count:3d} {kind}")


def open_base(folder: Path) -> tuple[Checkpoint, Layout]:
    base = Checkpoint.open(folder)
    headers = {name: (info.dtype, info.shape) for name, info in base.tensors.items()}
    return base, parameters(headers, base.config)


def open_adapter(folder: Path, base: Checkpoint, layout: Layout) -> Adapter:
    config = json.loads((folder / "adapter_config.json").read_text())
    if config["peft_type"] == "LORA" and not method_of(config):
        return open_peft(folder, layout=layout)
    tensors = load_file(folder / "adapter_model.safetensors")
    return open_variant(tensors, config, layout.by_name, read=lambda parameter: read_whole(base, parameter)).adapter()


def changes(adapter: Adapter, base: Checkpoint, layout: Layout) -> dict[str, Tensor]:
    """Every parameter that the adapter changes, as it is afterwards."""
    changed = {name: tensor.float() for name, tensor in adapter.saved.items()}

    def now(name: str) -> Tensor:
        return changed.get(name, read_whole(base, layout.by_name[name]).float())

    for name, weight in adapter.weights.items():
        delta: LowRank | Tensor = weight.delta
        if weight.magnitude is not None:
            delta = rescaled(as_matrix(now(name), weight.kind), delta, weight.magnitude)
        changed[name] = now(name) + own_layout(weight, delta)
        if weight.bias is not None:
            bias = name.removesuffix("weight") + "bias"
            changed[bias] = now(bias) + weight.bias * weight.delta.scaling
    for name, difference in adapter.added.items():
        changed[name] = now(name) + difference
    for name, (indices, rows) in adapter.token_rows.items():
        changed[name] = now(name).index_copy(0, torch.tensor(indices), rows.float())
    return changed


def own_layout(weight: AdaptedWeight, delta: LowRank | Tensor) -> Tensor:
    """The change as a dense tensor in the weight's own layout."""
    matrix = delta.dense() if isinstance(delta, LowRank) else delta
    if weight.shape is None:
        assert weight.kind is not Kind.CONVOLUTION
        return from_matrix(matrix, weight.kind, as_matrix(matrix, weight.kind).shape)
    return from_matrix(matrix, weight.kind, weight.shape)


def weighted_sum(adapters: dict[str, Adapter], factors: dict[str, float]) -> dict[str, AdaptedWeight]:
    """sum_t w_t delta_t for every parameter that any of the adapters changes."""
    total: dict[str, AdaptedWeight] = {}
    for label, adapter in adapters.items():
        for name, weight in adapter.weights.items():
            delta = weight.delta * factors[label]
            if name in total:
                delta = total[name].delta + delta
            total[name] = AdaptedWeight(weight.kind, delta, weight.shape)
    return total
