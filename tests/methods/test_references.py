"""Every method against what other implementations gave on the same numbers.

Cases are folders' ``merge/`` and ``mergekit/`` files: of the folder that LRMERGE_VECTORS names, else of
``tests/vectors`` and of ``../shared/vectors`` beside the checkout. What ran, was compared in full or in part, or could
not be, and why, is printed at the end (pytest -rP).
"""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods import eigenlorax, opcm
from mergekit_lr.methods.adarank import initial_masks
from mergekit_lr.methods.iso_c import flattened
from mergekit_lr.methods.spaces import core_basis, knots_basis, lifted
from mergekit_lr.methods.ties import ties, trim_threshold

ROOT = Path(__file__).parents[1]
FOLDERS = (
    [Path(os.environ["LRMERGE_VECTORS"])]
    if "LRMERGE_VECTORS" in os.environ
    else [ROOT / "vectors", ROOT.parents[1] / "shared" / "vectors"]
)
CASES = {
    path.stem: path
    for folder in FOLDERS
    for kind in ("merge", "mergekit")
    for path in sorted((folder / kind).glob("*.json"))
}
# mergekit takes lengths (karcher) and the sums of weights that it divides by (ties) in float32, of float64 too.
SINGLE = ("mk_karcher", "mk_ties-negweight", "mk_ties-weights")
RAN: Counter[str] = Counter()

Tensors = dict[str, Tensor]


class Case:
    """One case: its facts, and its tensors by role, task and key."""

    def __init__(self, path: Path):
        self.facts = json.loads(path.read_text())
        self.parameters: dict[str, Any] = self.facts["parameters"]
        tensors = load_file(path.with_suffix(".safetensors"))
        self.base = part(tensors, "in/base/")
        self.masks = part(tensors, "in/mask/")
        self.out = part(tensors, "out/")
        self.aux = part(tensors, "aux/")
        self.tasks = []
        while task := part(tensors, f"in/task{len(self.tasks)}/"):
            self.tasks.append(task)

    def of(self, key: str) -> list[Tensor]:
        return [task[key] for task in self.tasks]

    def deltas(self, key: str) -> list[Tensor]:
        return [task[key] - self.base[key] for task in self.tasks]

    def factors(self, layer: str) -> list[LowRank]:
        return [LowRank(task[f"{layer}.lora_A.weight"], task[f"{layer}.lora_B.weight"]) for task in self.tasks]

    def layers(self) -> list[str]:
        return [key.removesuffix(".lora_A.weight") for key in self.tasks[0] if key.endswith(".lora_A.weight")]


@pytest.mark.parametrize("name", CASES)
def test_case(name: str):
    case = Case(CASES[name])
    source = case.facts["source"]["repository"].rpartition("/")[2]
    method = case.facts["method"]
    rule = METHODS.get(method) or METHODS[method.partition("_")[0] + "_"]
    if case.facts["well_posed"]:
        mine = rule(case)
        assert mine.keys() == case.out.keys()
        if any(name.startswith(rough) for rough in SINGLE):
            limit = 2e-7 * max(float(tensor.abs().max()) for tensor in case.out.values())
            compare(mine, case.out, {"rtol": 0.0, "atol": limit})
            RAN[f"{source}: compared to float32 (it takes lengths or divisors in that)"] += 1
        else:
            compare(mine, case.out, case.facts["tolerance"])
            RAN[f"{source}: compared"] += 1
    elif name in IN_PART:
        IN_PART[name](case, rule(case))
        RAN[f"{source}: compared in part"] += 1
    else:
        for key, tensor in rule(case).items():
            assert bool(tensor.isfinite().all()), key
        RAN[f"{source}: not comparable ({ARBITRARY[name]}); finite"] += 1


def test_some_ran():
    assert CASES, f"no cases under {', '.join(map(str, FOLDERS))}"
    for kind, count in sorted(RAN.items()):
        print(f"{count:3d} {kind}")


def part(tensors: Tensors, prefix: str) -> Tensors:
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


def compare(mine: Tensors, theirs: Tensors, tolerance: dict[str, float]) -> None:
    for key, tensor in theirs.items():
        torch.testing.assert_close(
            mine[key].to(tensor.dtype), tensor, **tolerance, msg=lambda m, key=key: f"{key}: {m}"
        )


def single(number: float) -> float:
    """A coefficient that the other implementation keeps in float32, whatever the tensors are."""
    return torch.tensor(number).item()


def dense(delta: Tensor | LowRank) -> Tensor:
    return delta.dense() if isinstance(delta, LowRank) else delta


# Task vectors: iso_c, iso_cts, tsv_m


def spectral(name: str, **options: Any) -> Callable[[Case], Tensors]:
    def rule(case: Case) -> Tensors:
        merged = {}
        for key in case.out:
            matrix = case.tasks[0][key].ndim == 2 and "text_projection" not in key
            given = case.of(key)
            merged[key] = lr.merge_tensors(name, given, **options) if matrix else torch.stack(given).mean(0)
            if case.tasks[0][key].ndim < 2:  # vectors: the method itself averages them
                merged[key] = lr.merge_tensors(name, given, **options)
        return merged

    return rule


def iso_cts(case: Case) -> Tensors:
    return spectral("iso_cts", common_fraction=case.parameters["common_space_fraction"])(case)


def iso_c_in_part(case: Case, mine: Tensors) -> None:
    """Null vectors that LAPACK chose are in theirs: ours is theirs on the range, at the same mean."""
    for key, projected in case.aux.items():
        if key.startswith("proj."):
            key = key.removeprefix("proj.")
            ours = lr.merge_tensors("iso_c", case.of(key), support="range_full_mean")
            compare({key: ours}, {key: projected}, case.facts["tolerance"])
            values = torch.linalg.svdvals(lr.merge_tensors("iso_c", case.of(key), support="full"))
            torch.testing.assert_close(values, case.aux[f"mean_sv.{key}"].reshape(()).expand_as(values))
    vectors_in_part(case, mine)


def vectors_in_part(case: Case, mine: Tensors) -> None:
    theirs = {key: tensor for key, tensor in case.out.items() if tensor.ndim != 2}
    assert theirs
    compare(mine, theirs, case.facts["tolerance"])


def opcm_in_part(case: Case, mine: Tensors) -> None:
    """One norm for the model: where projected tensors differ, the others keep their direction."""
    others = [key for key in case.out if not key.startswith("fc") or not key.endswith("weight")]
    assert others
    for key in others:
        ours, theirs = mine[key] - case.base[key], case.out[key] - case.base[key]
        torch.testing.assert_close(ours / ours.norm(), theirs / theirs.norm(), rtol=0, atol=1e-9)


# Core Space, its dense and its KnOTS variants


def core_space(case: Case) -> Tensors:
    """``core_*`` and ``full_*`` of the Core Space repository: scales are 1 there."""
    p = case.parameters
    merged = {}
    for layer in case.layers():
        factors = case.factors(layer)
        if p["merge_space"] == "core":
            basis = core_basis(factors)
            shape = tuple(min(side, sum(f.rank for f in factors)) for side in factors[0].shape)
            result = lifted(inner(p, basis.coordinates, shape), basis).dense()
        elif p["merge_space"] == "full":
            given = [f.dense() for f in factors]
            result = inner(p, given, tuple(given[0].shape))
        else:
            basis = knots_basis(factors, floor=1e-5)
            result = basis.U @ (basis.S[:, None] * inner({**p, "isotropize": False}, basis.V, tuple(basis.V[0].shape)))
            result = dense(flattened(result)) if p.get("isotropize") else result
        merged[f"{layer}.weight"] = result
    return merged


def inner(p: dict[str, Any], given: list[Tensor], shape: tuple[int, ...]) -> Tensor:
    match p["merge_method"]:
        case "mean":
            merged = lr.merge_tensors("task_arithmetic", given, normalize=True)
        case "tv":
            merged = lr.merge_tensors("task_arithmetic", given)
        case "ties":
            share = p["topK"] / 100
            # One more than the share, of all entries of their bases, those beyond the rank included.
            keep = int(shape[0] * shape[1] * share) + 1
            limits = [trim_threshold([tensor], keep) for tensor in given]
            merged = lr.merge_tensors("ties", given, threshold=limits, zero_sign="majority")
        case "tsv":
            merged = lr.merge_tensors("tsv_m", given)
        case "cart":
            options = {"fraction": p["cart_pruning_rank"], "strength": p["cart_scaling_coeffs"], "round_up": True}
            merged = lr.merge_tensors("cart", given, **options)
        case other:
            raise AssertionError(other)
    return dense(flattened(dense(merged))) if p.get("isotropize") else dense(merged)


def knots(case: Case) -> Tensors:
    """The KnOTS repository: the threshold is one for the whole model."""
    p = case.parameters
    left = p.get("concat_across_output", True)
    bases, parts = {}, {}
    for layer in case.layers():
        factors = case.factors(layer) if left else [LowRank(f.B.mT, f.A.mT) for f in case.factors(layer)]
        if case.facts["method"] == "knots_ties":
            basis = knots_basis(factors, floor=1e-5)
            bases[layer], parts[layer] = basis.U, [basis.S[:, None] * V for V in basis.V]
        else:
            parts[layer] = [f.dense() for f in factors]
    size = sum(given[0].numel() for given in parts.values())
    merged = {}
    for layer, given in parts.items():
        if p["merge_method"] == "tv":
            total = lr.merge_tensors("task_arithmetic", given, normalize=p["merging_type"] == "mean")
        else:
            keep = int(size * p["topK"] / 100) + 1
            limits = [trim_threshold([q[t] for q in parts.values()], keep) for t in range(len(given))]
            total = ties(given, threshold=limits, normalize=p["merging_type"] == "mean")
        total = dense(total) * single(p["scaling_coeffs"][0])
        total = bases[layer] @ total if bases else total
        merged[f"{layer}.weight"] = total if left else total.mT
    return merged


# AdaRank


def adarank(case: Case) -> Tensors:
    p = case.parameters
    options: dict[str, Any] = {"weights": single(p["prior"]), "centered": p["merge_method"] == "CART"}
    if "initial_rank_ratio" in p:
        options["ratio"] = p["initial_rank_ratio"]
    merged = {}
    for key, base in case.base.items():
        if decomposed(key):
            if key in case.masks:
                options["masks"] = case.masks[key]
            else:
                size = min(base.shape)
                merged[f"initial_mask.{key}"] = initial_masks(size, len(case.tasks), p["initial_rank_ratio"])
            merged[key] = base + lr.merge_tensors("adarank", case.deltas(key), **options)
        else:
            flat = {k: v for k, v in options.items() if k != "masks"}
            merged[key] = base + lr.merge_tensors("adarank", case.deltas(key), vectors=base.ndim > 1, **flat)
    return merged


def adarank_static(case: Case) -> Tensors:
    p = case.parameters
    prior, ratio = p["prior"], p["rank_ratio"]
    merged = {}
    for key, base in case.base.items():
        deltas = case.deltas(key)
        if not decomposed(key):
            flat = base.ndim > 1
            if p["merge_method"] == "pre_CART":
                merged[key] = base + lr.merge_tensors("task_arithmetic", deltas, scale=prior)
            elif p["merge_method"] == "CART":
                merged[key] = base + lr.merge_tensors("cart", deltas, vectors=flat)
            else:
                merged[key] = base + lr.merge_tensors("tsv_m", deltas, scale=prior, vectors=flat)
        elif p["merge_method"] in ("CART", "pre_CART"):
            centered = p["merge_method"] == "CART"
            options = {"fraction": ratio, "strength": prior, "centered": centered}
            merged[key] = lr.merge_tensors("cart", case.of(key), base=base, **options)
        else:
            rank = None if p["merge_method"] == "TSV" else max(1, int(ratio * min(base.shape)))
            merged[key] = lr.merge_tensors("tsv_m", case.of(key), base=base, scale=prior, rank=rank)
    return merged


def decomposed(key: str) -> bool:
    return ("attn" in key or "mlp" in key) and not ("ln" in key or "bias" in key)


# OPCM, EigenLoRAx, LoRA-LEGO


def continual(case: Case) -> Tensors:
    updates = [{key: task[key] - base for key, base in case.base.items()} for task in case.tasks]
    matrices = [key for key in case.base if key.startswith("fc") and key.endswith("weight")]
    state = opcm.begin(updates[0])
    for t, update in enumerate(updates[1:], start=1):
        state = opcm.merge_next(state, update, alpha=case.parameters["alpha"], matrices=matrices)
        if case.facts["well_posed"]:
            rough = 1e-4 if case.facts["input_dtypes"] == ["float32"] else 1e-9
            assert state.mean_norm == pytest.approx(case.facts["logs"][f"model/avg_task_vector_norm@{t}"], rel=rough)
            assert state.scale == pytest.approx(case.facts["logs"][f"model/lambda_t@{t}"], rel=rough)
    return {key: base + state.deltas[key] for key, base in case.base.items()}


def shared_basis(case: Case) -> Tensors:
    out = {}
    for layer in case.layers():
        factors = case.factors(layer)
        basis = eigenlorax.shared_basis(factors, case.parameters["num_components"], center=True)
        for side, C, variance in (("A", basis.A, basis.A_variance), ("B", basis.B, basis.B_variance)):
            key = f"{layer}.lora_{side}.weight"
            out[f"projector.{key}"] = C @ C.mT
            out[f"eigenvalues.{key}"] = variance
            out[f"abs_components.{key}"] = C.abs()
        for t, factor in enumerate(factors):
            back = eigenlorax.reconstruct(eigenlorax.coefficients(factor, basis), basis)
            out[f"recon.task{t}.{layer}.lora_A.weight"] = back.A
            out[f"recon.task{t}.{layer}.lora_B.weight"] = back.B
    return out


def lora_lego(case: Case) -> Tensors:
    p = case.parameters
    options = {"rank": p["K"], "reweight": p["use_param_reweighting"], "rescale": p["use_output_reweighting"]}
    return {
        f"{layer}.weight": dense(lr.merge_tensors("lora_lego", case.factors(layer), feature="unit", **options))
        for layer in case.layers()
    }


# mergekit


def mergekit(case: Case) -> Tensors:
    name = case.facts["method"].removeprefix("mk_")
    method = lr.methods()[name]
    p = {key: v for key, v in case.parameters.items() if key not in ("base_model", "zero_task", "int8_mask", "tasks")}
    p = {key: v for key, v in p.items() if key != "density" or "density" in method.parameters}
    if "compat" in method.parameters:
        p["compat"] = "mergekit"
    merged = {}
    for key in case.out:
        models, base = case.of(key), case.base.get(key)
        if name == "arcee_fusion":  # their base is the first task
            models, base = models[1:], models[0]
        merged[key] = lr.merge_tensors(name, models, base=base, **p)
    return merged


METHODS: dict[str, Callable[[Case], Tensors]] = {
    "iso_c": spectral("iso_c"),
    "iso_cts": iso_cts,
    "tsv_m": spectral("tsv_m"),
    "tsv_m_eigen": spectral("tsv_m"),
    "tsv_m_lossless": spectral("tsv_m", rank=10**6),
    "core_": core_space,
    "full_": core_space,
    "knots_ties_per_layer": core_space,
    "knots_ties_iso": core_space,
    "knots_tv_per_layer": core_space,
    "knots_tsv": core_space,
    "knots_ties": knots,
    "knots_repo_ties_dense": knots,
    "knots_repo_tv_dense": knots,
    "adarank_given_mask": adarank,
    "adarank_initial_mask": adarank,
    "adarank_static": adarank_static,
    "opcm": continual,
    "eigenlorax": shared_basis,
    "lora_lego": lora_lego,
    "mk_": mergekit,
}
# Not well posed, and nothing in it is: what theirs depends on.
ARBITRARY = {
    "core_iso_c-shared_A-f64": "null vectors in the bases",
    "core_iso_c-zero_task-f64": "null vectors in the bases",
    "core_tsv-2mixed-f64": "null vectors of the adapter of lower rank",
    "core_tsv-shared_A-f64": "null vectors in the bases",
    "core_tsv-zero_task-f64": "null vectors in the bases",
    "core_tsv_iso-2mixed-f64": "null vectors of the adapter of lower rank",
    "full_iso_c-3x4-f64": "null vectors of the sum",
    "full_tsv-3x4-f64": "null vectors of each delta",
    "knots_ties-zero_task-top20": "TIES on rounding in place of zeros",
    "knots_ties_iso-3x4-f64": "null vectors of the merged delta",
    "lora_lego-random-k5-seeded": "another start of k-means",
}
IN_PART: dict[str, Callable[[Case, Tensors], None]] = {
    "iso_c-rank_deficient-f64": iso_c_in_part,
    "iso_cts-zero_task-f64": vectors_in_part,
    "tsv_m-zero_task-f64": vectors_in_part,
    "tsv_m-low_rank_bad-f64": vectors_in_part,
    "opcm-low_rank-f64": opcm_in_part,
}
