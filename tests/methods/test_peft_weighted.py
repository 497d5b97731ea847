"""The combinations of ``add_weighted_adapter`` against what PEFT made of the same adapters.

Cases are the folders of ``peft_weighted/``: of the folder that LRMERGE_VECTORS names, else of ``tests/vectors`` and of
``../shared/vectors`` beside the checkout.
"""

from __future__ import annotations

import json
import os
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergekit_lr as lr
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft import open_peft
from mergekit_lr.adapter.variants.site import from_matrix
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import parameters

ROOT = Path(__file__).parents[1]
FOLDERS = (
    [Path(os.environ["LRMERGE_VECTORS"])]
    if "LRMERGE_VECTORS" in os.environ
    else [ROOT / "vectors", ROOT.parents[1] / "shared" / "vectors"]
)
CASES = {
    "/".join(path.parent.parts[-2:]): path.parent
    for folder in FOLDERS
    for path in sorted((folder / "peft_weighted").glob("*/*/case.json"))
}
OPTIONS = {
    "svd_rank": "rank",
    "svd_clamp": "clamp",
    "density": "density",
    "majority_sign_method": "majority_sign_method",
}
RAN: Counter[str] = Counter()


@pytest.mark.parametrize("name", CASES)
def test_combination(name: str):
    folder = CASES[name]
    facts = json.loads((folder / "case.json").read_text())
    arguments = facts["arguments"]
    kind = arguments["combination_type"]
    base = Checkpoint.open(folder.parent / "base")
    layout = parameters({n: (info.dtype, info.shape) for n, info in base.tensors.items()}, base.config)
    adapters = [open_peft(folder.parent / label, layout=layout) for label in arguments["adapters"]]
    options = {ours: arguments[theirs] for theirs, ours in OPTIONS.items() if theirs in arguments}
    if kind.endswith("svd"):  # PEFT's rank is one for the model, the largest of any module
        options.setdefault("rank", facts.get("result_config", {}).get("r"))
    if "error" in facts:
        refused = 0
        for n in sorted({n for adapter in adapters for n in adapter.weights}):
            given = [adapter.weights[n].delta for adapter in adapters if n in adapter.weights]
            if not kind.endswith("svd") and len({delta.rank for delta in given}) > 1:
                refused += 1
                with pytest.raises(lr.LrmergeError, match="adapters of one rank"):
                    lr.merge_tensors("peft", given, combination=kind, **options)
            else:  # a rank beyond a side of the layer is no error here
                merged = lr.merge_tensors("peft", given, combination=kind, **options)
                assert isinstance(merged, LowRank)
                assert bool(merged.norm().isfinite())
        assert (refused > 0) == (not kind.endswith("svd"))
        RAN[f"{kind}: refused by PEFT"] += 1
        return
    result = load_file(folder / "result.safetensors")
    for module, scaling in facts["scaling_of_result"].items():
        present = [
            (adapter.weights[f"{module}.weight"], weight)
            for adapter, weight in zip(adapters, arguments["weights"], strict=True)
            if f"{module}.weight" in adapter.weights
        ]
        given = [weight.delta for weight, _ in present]
        merged = lr.merge_tensors("peft", given, weights=[w for _, w in present], combination=kind, **options)
        assert isinstance(merged, LowRank)
        weight = present[0][0]
        theirs = result[f"delta/{module}"] / scaling  # with rsLoRA PEFT's scaling is not 1, as it should be
        shape = theirs.shape if weight.shape is None else weight.shape
        torch.testing.assert_close(from_matrix(merged.dense(), weight.kind, shape), theirs, **facts["tolerance"])
        A = result.get(f"A/{module}")
        if A is not None and not kind.endswith("svd") and kind != "cat":
            torch.testing.assert_close(merged.A, A.flatten(1), **facts["tolerance"])
    RAN[kind] += 1


def test_some_ran():
    assert CASES, f"no cases under {', '.join(map(str, FOLDERS))}"
    for kind, count in sorted(RAN.items()):
        print(f"{count:3d} {kind}")
