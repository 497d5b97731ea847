"""How the inputs of a merge relate: the figures are their dense definitions, and the merge itself is not changed."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file
from tiny import contents

import mergekit_lr as lr
from mergekit_lr.verbs.compare import compare_factors
from mergekit_lr.verbs.merge.similarity import DIRECTIONS, compared

NAMES = ("math", "code", "talk")


@pytest.fixture(scope="module")
def deltas(results) -> dict[str, list[torch.Tensor]]:
    """Every changed matrix of the three models, in float64."""
    base = load_file(results / "in" / "base" / "model.safetensors")
    tuned = [load_file(results / "in" / name / "model.safetensors") for name in NAMES]
    return {n: [t[n].double() - w.double() for t in tuned] for n, w in base.items() if w.dim() == 2}


def told(results, name: str) -> dict:
    return json.loads((results / name / "lrmerge.json").read_text())["similarity"]


def test_models_are_compared_by_their_changes(results, deltas):
    similarity = told(results, "models")
    assert similarity["names"] == list(NAMES)
    flat = torch.stack([torch.cat([delta[i].reshape(-1) for delta in deltas.values()]) for i in range(3)])
    assert similarity["norms"] == pytest.approx(flat.norm(dim=1).tolist(), rel=1e-5)
    unit = torch.nn.functional.normalize(flat, dim=1)
    for row, wanted in zip(similarity["cosine"], (unit @ unit.mT).tolist(), strict=True):
        assert row == pytest.approx(wanted, abs=1e-5)
    assert {module["name"] for module in similarity["modules"]} == deltas.keys()
    for module in similarity["modules"]:
        stacked = torch.stack([delta.reshape(-1) for delta in deltas[module["name"]]])
        assert module["norms"] == pytest.approx(stacked.norm(dim=1).tolist(), rel=1e-5)
        opposite = (stacked[0] * stacked[1] < 0).double().mean()
        assert module["opposite"][0][1] == pytest.approx(float(opposite), abs=1e-6)


def test_adapters_are_compared_as_compare_does(results):
    wanted = lr.compare([results / "in" / f"{name}-lora" for name in NAMES]).to_json()
    similarity = told(results, "adapters")
    assert similarity["norms"] == pytest.approx(wanted["norms"], rel=1e-6)
    for key in ("cosine", "output", "input"):
        for row, expected in zip(similarity[key], wanted[key], strict=True):
            assert row == pytest.approx(expected, abs=1e-5)
    assert similarity["interference"] == pytest.approx(wanted["interference"], rel=1e-4)


def test_dense_changes_of_low_rank_have_the_figures_of_their_factors():
    random = torch.Generator().manual_seed(3)
    factors = []
    for rank in (3, 5):
        A, B = torch.randn(rank, 40, generator=random), torch.randn(60, rank, generator=random)
        factors.append(lr.LowRank(A, B))
    assert max(delta.rank for delta in factors) <= DIRECTIONS
    wanted = compare_factors("x", (0, 1), factors, seed=7)
    found = compared("x", {0: factors[0].dense(), 1: factors[1].dense()}, seed=7)
    for key in ("inner", "output", "input"):
        torch.testing.assert_close(torch.tensor(found[key]), torch.tensor(getattr(wanted, key)), rtol=1e-4, atol=1e-4)
    assert found["interference"] == pytest.approx(wanted.interference, rel=1e-3)


def test_zeros_vectors_and_single_changes_are_no_comparison():
    one, nothing = torch.ones(4, 4), torch.zeros(4, 4)
    assert compared("x", {0: one, 2: nothing}, seed=0) == {"tasks": [0], "norms": [4.0]}
    assert compared("x", {0: torch.ones(4), 1: torch.ones(4)}, seed=0) == {"tasks": [0, 1], "norms": [2.0, 2.0]}
    assert compared("x", {}, seed=0) == {"tasks": [], "norms": []}


def test_merge_is_the_same_with_and_without(results):
    compared_too, plain = contents(results / "adapters"), contents(results / "plain")
    assert compared_too["adapter_model.safetensors"] == plain["adapter_model.safetensors"]
    assert json.loads(plain["lrmerge.json"])["similarity"] is None


def test_without_a_base_there_is_nothing_to_compare(results):
    models = [{"model": str(results / "in" / name)} for name in NAMES]
    report = lr.merge({"merge_method": "linear", "models": models}, compare_inputs=True)
    assert report.similarity is None
    assert report.result is not None
