"""What every method promises, as properties: identities, invariances, bounds, determinism.

Numbers P3 ... P20 are those of the catalogue in which each is stated with its tolerance.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import Any

import given as make
import pytest
import torch
from given import close, dense, kinds, orthogonal, seeds
from hypothesis import given, settings
from hypothesis import strategies as st
from lrgpu.clustering import Clusters, centre_weights
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods import eigenlorax, opcm
from mergekit_lr.methods.lora_lego import unit_gram
from mergekit_lr.methods.spaces import core_basis, knots_basis, run

few = settings(max_examples=8, deadline=None)

# Each method on deltas, with parameters under which it does what it is for.
DELTAS: dict[str, dict[str, Any]] = {
    "task_arithmetic": {},
    "ties": {"density": 0.5},
    "breadcrumbs": {"density": 0.6, "gamma": 0.1},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.1},
    "sce": {"select_topk": 0.5},
    "ram": {},
    "ramplus_tl": {},
    "dare_linear": {"density": 0.5},
    "dare_ties": {"density": 0.5},
    "della_linear": {"density": 0.5},
    "della": {"density": 0.5},
    "iso_c": {},
    "iso_cts": {"common_fraction": 0.5},
    "tsv_m": {},
    "cart": {"fraction": 0.3},
    "adarank": {"ratio": 0.5},
    "svd": {"rank": 2},
    "opcm": {},
}
WEIGHTS: dict[str, dict[str, Any]] = {
    "linear": {},
    "slerp": {"t": 0.3},
    "nuslerp": {},
    "multislerp": {},
    "karcher": {},
    "model_stock": {},
    "nearswap": {"t": 0.1},
    "arcee_fusion": {},
    "passthrough": {"scale": 0.5},
    "laser": {"keep": 0.5},
}
FACTORS: dict[str, dict[str, Any]] = {
    "cat": {},
    "core_space": {"inner": "ties", "density": 0.5},
    "lora_lego": {},
    "factor_average": {},
    "peft": {"combination": "ties_svd", "density": 0.5},
}
RANDOM = ("dare_linear", "dare_ties", "della_linear", "della")
ORDERED = ("opcm", "slerp")  # the order of the models is part of the method
EQUIVARIANT = ("task_arithmetic", "iso_c", "iso_cts", "tsv_m", "cart", "svd", "opcm")
# An absolute threshold is part of the definition.
ABSOLUTE = ("ram", "ramplus_tl", "nearswap", "arcee_fusion")


def merge(name: str, inputs: Any, **options: Any) -> Tensor:
    """The method by name with the parameters of the tables above, multiplied out."""
    options = {**DELTAS, **WEIGHTS, **FACTORS}[name] | options
    return dense(lr.merge_tensors(name, inputs, **options))


def models(name: str, seed: int, kind: str) -> tuple[list[Tensor], dict[str, Any]]:
    """Inputs for any method on dense tensors: as many as it takes, and a base where it needs one."""
    method = lr.methods()[name]
    tasks = method.models[1] or 3
    inputs = make.deltas(seed, kind, max(tasks, 2))[:tasks]
    if method.base != "required":
        return inputs, {}
    base = make.deltas(seed + 1, "row" if kind == "row" else "column" if kind == "column" else "plain", 1)[0]
    return [base + delta for delta in inputs], {"base": base}


def test_every_method_is_tested():
    assert {*DELTAS, *WEIGHTS, *FACTORS} == set(lr.methods())


# P3: spaces


@few
@given(seeds, kinds, st.sampled_from(["core", "knots"]))
def test_linear_methods_agree_in_every_space(seed: int, kind: str, space: str):
    adapters = make.adapters(seed, kind)
    weights = [0.5, 1.0, -0.3]
    exact = sum((w * f.dense() for w, f in zip(weights, adapters, strict=True)), start=torch.tensor(0.0))
    inside = lr.merge_tensors("task_arithmetic", adapters, weights=weights, space=space)
    assert isinstance(inside, LowRank)
    close(inside, exact, 1e-12)
    close(lr.merge_tensors("cat", adapters, weights=weights), exact, 1e-12)
    close(lr.merge_tensors("task_arithmetic", adapters, weights=weights), exact, 1e-12)


@few
@given(seeds, kinds, st.sampled_from([1, 2, 7, 14]))
def test_bases_give_each_delta_back(seed: int, kind: str, rank: int):
    adapters = make.adapters(seed, kind, rank=rank)
    core, knots = core_basis(adapters), knots_basis(adapters)
    for t, adapter in enumerate(adapters):
        scale = float(max(f.dense().abs().max() for f in adapters))
        for back in (core.U @ core.coordinates[t] @ core.V.mT, knots.U @ (knots.S[:, None] * knots.V[t])):
            torch.testing.assert_close(back, adapter.dense(), rtol=0, atol=1e-12 * scale)
    close(core.U.mT @ core.U, torch.eye(core.U.shape[-1], dtype=torch.float64), 1e-12)
    close(knots.U.mT @ knots.U, torch.eye(knots.U.shape[-1], dtype=torch.float64), 1e-12)
    squares = torch.stack([(knots.S[:, None] * V) @ (knots.S[:, None] * V).mT for V in knots.V]).sum(0)
    close(squares, torch.diag(knots.S**2), 1e-11)


# P4: the same delta in other factors


@few
@given(seeds, st.sampled_from(["iso_c", "tsv_m", "cart", "svd", "opcm", "lora_lego", "knots ties", "core tsv_m"]))
def test_gauge_invariance(seed: int, name: str):
    adapters = make.adapters(seed)
    turned = []
    for t, f in enumerate(adapters):
        values = torch.diag(torch.tensor([2.0, 0.4], dtype=torch.float64))
        G = orthogonal(seed + t, 2) @ values @ orthogonal(seed + t + 1, 2)
        turned.append(LowRank(torch.linalg.solve(G, f.A), f.B @ G, f.scaling))
    space, _, rule = name.rpartition(" ")
    options = {"canonical": "svd"} if rule == "lora_lego" else {}
    where = {"space": space} if space else {}
    close(merge(rule, adapters, **where, **options), merge(rule, turned, **where, **options), 1e-8)


# P5: the order of the models


@few
@given(seeds, st.sampled_from([n for n in (*DELTAS, *WEIGHTS) if n not in ORDERED]))
def test_order_of_models(seed: int, name: str):
    inputs, base = models(name, seed, "plain")
    order = torch.randperm(len(inputs), generator=torch.Generator().manual_seed(seed)).tolist()
    labels = [f"model {t}" for t in range(len(inputs))]
    method = lr.methods()[name]
    options: dict[str, Any] = {}
    shuffled: dict[str, Any] = {}
    if "weights" in method.parameters:
        weights = [0.4 + 0.3 * t for t in range(len(inputs))]
        options["weights"], shuffled["weights"] = weights, [weights[t] for t in order]
    one = merge(name, inputs, models=labels, **base, **options)
    other = merge(name, [inputs[t] for t in order], models=[labels[t] for t in order], **base, **shuffled)
    close(one, other, 1e-10)


def test_legos_depend_on_the_order_only_through_the_start():
    a = make.adapters(3)
    copies = [a[0], LowRank(a[0].A * 1.001, a[0].B, a[0].scaling), LowRank(a[0].A, a[0].B * 0.999, a[0].scaling)]
    close(merge("lora_lego", copies, rank=2), merge("lora_lego", copies[::-1], rank=2), 1e-10)


# P6: other coordinates


@few
@given(seeds, st.sampled_from(EQUIVARIANT))
def test_equivariance(seed: int, name: str):
    deltas = make.deltas(seed)
    Q, R = orthogonal(seed, 9), orthogonal(seed + 1, 7)
    close(merge(name, [Q @ d @ R.mT for d in deltas]), Q @ merge(name, deltas) @ R.mT, 1e-8)


# P7, P8: scale


@few
@given(
    seeds, st.sampled_from([n for n in (*DELTAS, *WEIGHTS) if n not in ABSOLUTE]), st.sampled_from([0.01, 0.5, 30.0])
)
def test_homogeneity(seed: int, name: str, factor: float):
    inputs, base = models(name, seed, "plain")
    scaled = {key: factor * value for key, value in base.items()}
    # multislerp and karcher add an absolute number to lengths; iso_cts and tsv_m divide by small singular values.
    tight = {"multislerp": 1e-6, "karcher": 1e-6, "iso_cts": 1e-11, "tsv_m": 1e-11}.get(name, 1e-12)
    close(merge(name, [factor * x for x in inputs], **scaled), factor * merge(name, inputs, **base), tight)


@few
@given(seeds, st.sampled_from([n for n in FACTORS if n != "factor_average"]))
def test_scaling_may_lie_in_the_factors(seed: int, name: str):
    adapters = make.adapters(seed)
    if name == "lora_lego":  # units are compared by size, so the scaling goes to both sides
        folded = [LowRank(f.A * math.sqrt(f.scaling), f.B * math.sqrt(f.scaling)) for f in adapters]
    else:
        folded = [LowRank(f.A, f.B * f.scaling) for f in adapters]
    close(merge(name, adapters), merge(name, folded), 1e-12)


# P9, P10, P11: spectra


@few
@given(seeds, st.sampled_from(["plain", "rank-deficient", "duplicate", "zero task"]))
def test_iso_c_is_flat_and_keeps_the_nuclear_norm(seed: int, kind: str):
    deltas = make.deltas(seed, kind)
    total = torch.linalg.svdvals(sum(deltas, start=torch.zeros_like(deltas[0])))
    values = torch.linalg.svdvals(merge("iso_c", deltas))
    rank = int((total > 1e-12 * total[0]).sum())
    torch.testing.assert_close(values[:rank], (total.sum() / rank).expand(rank), rtol=1e-10, atol=0)
    assert float(values[rank:].abs().sum()) < 1e-10 * float(values[0])
    torch.testing.assert_close(values.sum(), total.sum(), rtol=1e-10, atol=0)
    full = merge("iso_c", deltas, support="range_full_mean")
    close(full, merge("iso_c", deltas) * (rank / min(deltas[0].shape)), 1e-12)


@few
@given(seeds)
def test_iso_cts_is_flat(seed: int):
    values = torch.linalg.svdvals(merge("iso_cts", make.deltas(seed)))
    torch.testing.assert_close(values, values.mean().expand_as(values), rtol=1e-10, atol=0)


@few
@given(seeds)
def test_isotropic_merging_between_its_ends(seed: int):
    deltas = make.deltas(seed)
    close(merge("iso_cts", deltas, common_fraction=1.0), merge("iso_c", deltas), 1e-10)
    close(merge("iso_c", deltas, blend=0.0), merge("task_arithmetic", deltas), 1e-10)
    twice = merge("iso_c", [merge("iso_c", deltas)])
    close(twice, merge("iso_c", deltas), 1e-10)


@few
@given(seeds)
def test_tsv_keeps_the_singular_values_it_takes(seed: int):
    deltas = make.deltas(seed)
    kept = torch.cat([torch.linalg.svdvals(d)[:2] for d in deltas]).sort(descending=True).values
    torch.testing.assert_close(torch.linalg.svdvals(merge("tsv_m", deltas))[:6], kept, rtol=1e-10, atol=0)


@few
@given(seeds)
def test_tsv_of_orthogonal_tasks_is_their_sum(seed: int):
    Q, R = orthogonal(seed, 9), orthogonal(seed + 1, 7)
    deltas = []
    for t in range(3):
        part = slice(2 * t, 2 * t + 2)
        deltas.append(Q[:, part] @ torch.diag(torch.tensor([2.0, 1.0 + t], dtype=torch.float64)) @ R[:, part].mT)
    close(merge("tsv_m", deltas), merge("task_arithmetic", deltas), 1e-10)


# P12, P13: LoRA-LEGO


@few
@given(seeds)
def test_legos_without_clustering_are_the_sum(seed: int):
    adapters = make.adapters(seed)
    total = merge("cat", adapters)
    close(merge("lora_lego", adapters, rank=6, rescale=False), total, 1e-12)
    close(merge("lora_lego", adapters, rank=6), total / math.sqrt(3), 1e-12)
    close(merge("lora_lego", [adapters[0]], rank=2), adapters[0].dense(), 1e-12)
    same = [adapters[0]] * 3
    close(merge("lora_lego", same, rank=2), adapters[0].dense(), 1e-12)
    close(merge("lora_lego", same, rank=2, centroid="rank1"), adapters[0].dense(), 1e-12)
    pairs = [LowRank(torch.stack([f.A, 2 * f.A]), torch.stack([f.B, f.B]), f.scaling) for f in adapters]
    both = merge("lora_lego", pairs, rank=3, weights=torch.tensor([[1.0, 2.0, 1.0], [1.0, 1.0, 1.0]]), seed=3)
    assert both.shape == (2, 12, 10)
    assert bool(both.isfinite().all())


@few
@given(seeds, st.sampled_from(["raw", "unit"]))
def test_distances_from_the_gram_matrix(seed: int, feature: str):
    f = make.adapters(seed, tasks=1, rank=6)[0]
    a, b = f.A, f.B.mT
    x = torch.cat([a, b], -1)
    if feature == "unit":
        x = torch.cat([a / a.norm(dim=-1, keepdim=True), b / b.norm(dim=-1, keepdim=True)], -1)
    Z = centre_weights(Clusters(torch.tensor([0, 0, 1, 1, 1, 0]), torch.ones(6, dtype=torch.float64), 0.0), 2)
    K = unit_gram(a, b, feature)
    inner = Z @ K
    distances = K.diagonal() - 2 * inner + (inner * Z).sum(-1)[:, None]
    torch.testing.assert_close(distances, torch.cdist(Z @ x, x) ** 2, rtol=1e-9, atol=1e-9)


@few
@given(seeds, kinds, st.integers(1, 8))
def test_shared_basis(seed: int, kind: str, components: int):
    """Enough components give every adapter back; with fewer the error of each side is the tail of its spectrum."""
    adapters = make.adapters(seed, kind)
    basis = eigenlorax.shared_basis(adapters, components)
    assert basis.B.shape[-1] <= components
    close(basis.B.mT @ basis.B, torch.eye(basis.B.shape[-1], dtype=torch.float64), 1e-12)
    stack = torch.cat([f.folded().B for f in adapters], -1)
    values = torch.linalg.svdvals(stack)
    error, size = 0.0, float((values**2).sum())
    for adapter in adapters:
        again = eigenlorax.reconstruct(eigenlorax.coefficients(adapter, basis), basis)
        error += float((again.B - adapter.folded().B).square().sum())
        if components >= 6:
            torch.testing.assert_close(again.dense(), adapter.dense(), rtol=0, atol=1e-12 * (1 + size))
    assert error == pytest.approx(float((values[components:] ** 2).sum()), abs=1e-12 * (1 + size))


# P14: OPCM


@few
@given(seeds, st.sampled_from([0.0, 0.3, 0.5, 1.0]), st.booleans())
def test_continual_merging(seed: int, alpha: float, low_rank: bool):
    given = make.adapters(seed) if low_rank else make.deltas(seed)
    state = opcm.begin({"w": given[0], "v": torch.ones(4, dtype=torch.float64)})
    norms = [math.sqrt(float(dense(given[0]).square().sum()) + 4)]
    for delta in given[1:]:
        merged = state.deltas["w"]
        rest = dense(opcm.project(delta, merged, alpha=alpha))
        assert abs(float((rest * dense(merged)).sum())) < 1e-10 * float(rest.norm() * dense(merged).norm())
        U, S, Vh = torch.linalg.svd(dense(merged), full_matrices=False)
        rank = int((S > 1e-12 * S[0]).sum())
        k = rank if alpha == 1 else int((S.cumsum(0) / S.sum() <= alpha)[:rank].sum())
        assert float((U[:, :k].mT @ rest @ Vh[:k].mT).abs().sum()) < 1e-10 * float(rest.norm())
        state = opcm.merge_next(state, {"w": delta, "v": torch.ones(4, dtype=torch.float64)}, alpha=alpha)
        norms.append(math.sqrt(float(dense(delta).square().sum()) + 4))
        size = math.sqrt(sum(float(dense(d).square().sum()) for d in state.deltas.values()))
        assert size == pytest.approx(sum(norms) / len(norms), rel=1e-10)
        assert isinstance(state.deltas["w"], LowRank) == low_rank


# P15: what must change nothing


@few
@given(seeds, st.sampled_from(["task_arithmetic", "ties", "dare_linear", "dare_ties", "della", "breadcrumbs", "sce",
                               "ram", "ramplus_tl", "cart", "svd", "opcm", "tsv_m", "adarank"]))  # fmt: skip
def test_one_model_is_returned(seed: int, name: str):
    delta = make.deltas(seed, tasks=1)[0]
    whole = {"density": 1.0} if "density" in lr.methods()[name].parameters else {}
    whole |= {"svd": {"rank": 9}, "adarank": {"ratio": 1.0, "weights": 1.0}, "sce": {"select_topk": 1.0}}.get(name, {})
    close(merge(name, [delta], **whole), delta, 1e-12)


@few
@given(seeds, kinds)
def test_scale_zero_returns_the_base_exactly(seed: int, kind: str):
    inputs = make.deltas(seed, kind)
    base = make.deltas(seed + 1, kind)[0]
    for name in DELTAS:
        if "scale" in lr.methods()[name].parameters:
            assert torch.equal(merge(name, [base + d for d in inputs], base=base, scale=0.0), base), name


@few
@given(seeds)
def test_density_one_is_no_sparsifier(seed: int):
    deltas = make.deltas(seed)
    total = merge("task_arithmetic", deltas)
    for name in ("dare_linear", "della_linear", "breadcrumbs"):
        assert torch.equal(merge(name, deltas, density=1.0), total), name
    assert torch.equal(merge("ties", deltas, density=1.0), merge("della", deltas, density=1.0))


@few
@given(seeds)
def test_spheres(seed: int):
    first, second = make.deltas(seed, tasks=2)
    close(merge("slerp", [first, second], t=0.0), first, 1e-12)
    close(merge("slerp", [first, second], t=1.0), second, 1e-12)
    close(merge("slerp", [first, second], t=0.3), merge("slerp", [second, first], t=0.7), 1e-12)
    units = [first / first.norm(), second / second.norm()]
    close(merge("karcher", units, tol=1e-12), merge("slerp", units, t=0.5), 1e-8)
    base = torch.zeros_like(first)
    close(merge("model_stock", [first, first], base=base), first, 1e-12)
    Q = orthogonal(seed, 63)
    apart = [Q[:, t].reshape(9, 7) for t in range(3)]
    close(base + 1 + merge("model_stock", apart, base=base), base + 1, 1e-12)


# P16: AdaRank


@few
@given(seeds)
def test_adarank_masks(seed: int):
    deltas = make.deltas(seed)
    ones = torch.ones(3, 7)
    close(merge("adarank", deltas, masks=ones, weights=0.4), merge("task_arithmetic", deltas, scale=0.4), 1e-10)
    mean = merge("task_arithmetic", deltas, normalize=True)
    close(merge("adarank", deltas, masks=ones, weights=2.3, centered=True), mean, 1e-10)
    close(merge("cart", deltas, fraction=1.0, strength=2.3), mean, 1e-10)
    first = merge("adarank", deltas, ratio=2 / 7, weights=1.0)
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    close(first, sum(U[:, :2] @ torch.diag(S[:2]) @ Vh[:2] for U, S, Vh in parts), 1e-10)
    adapters = make.adapters(seed)
    given = lr.merge_tensors("adarank", adapters, masks=torch.tensor([[1.0, -1.0]] * 3), weights=1.0)
    kept = [f.truncate(1).delta.dense() for f in adapters]
    close(given, sum(kept, start=torch.zeros_like(kept[0])), 1e-10)


@few
@given(seeds)
def test_mask_gradient(seed: int):
    """The gradient through a soft mask is lambda sigma_i u_i^T G v_i, which is what training masks relies on."""
    delta = make.deltas(seed, tasks=1)[0]
    G = make.deltas(seed + 1, tasks=1)[0]
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    z = torch.full((7,), 0.5, dtype=torch.float64, requires_grad=True)
    ((0.3 * (U * (z * S)) @ Vh) * G).sum().backward()
    assert z.grad is not None
    for i in range(7):
        with_i, without = torch.full((1, 7), 1.0), torch.full((1, 7), 1.0)
        without[0, i] = -1.0
        step = merge("adarank", [delta], masks=with_i, weights=0.3) - merge(
            "adarank", [delta], masks=without, weights=0.3
        )
        torch.testing.assert_close((step * G).sum(), z.grad[i], rtol=1e-10, atol=1e-12)


# P17: bounds, dtypes, defects


@few
@given(
    seeds, kinds, st.sampled_from([*DELTAS, *WEIGHTS]), st.sampled_from([torch.float64, torch.float32, torch.bfloat16])
)
def test_dtype_shape_and_no_nan(seed: int, kind: str, name: str, dtype: torch.dtype):
    inputs, base = models(name, seed, kind)
    base = {key: value.to(dtype) for key, value in base.items()}
    merged = merge(name, [x.to(dtype) for x in inputs], **base)
    assert merged.dtype == dtype
    assert merged.shape == inputs[0].shape
    assert bool(merged.isfinite().all())


@few
@given(seeds, kinds, st.sampled_from(list(FACTORS)), st.sampled_from([1, 2, 14]))
def test_adapters_no_nan(seed: int, kind: str, name: str, rank: int):
    adapters = make.adapters(seed, kind, rank=rank)
    merged = lr.merge_tensors(name, adapters, **FACTORS[name])
    assert isinstance(merged, LowRank)
    assert merged.shape == adapters[0].shape
    assert bool(merged.dense().isfinite().all())


@few
@given(seeds, kinds, st.sampled_from(list(DELTAS)), st.sampled_from(["full", "core", "knots"]))
def test_adapters_stay_factors(seed: int, kind: str, name: str, space: str):
    method = lr.methods()[name]
    adapters = make.adapters(seed, kind)
    if space not in method.spaces:
        with pytest.raises(lr.LrmergeError, match=f"{name} does not run in the space '{space}'"):
            lr.merge_tensors(name, adapters, space=space, **DELTAS[name])
        return
    merged = lr.merge_tensors(name, adapters, space=space, **DELTAS[name])
    assert isinstance(merged, LowRank) == (space != "full" or method.factored)
    assert bool(dense(merged).isfinite().all())
    if isinstance(merged, LowRank) and name != "opcm":  # the rank of the sum, at most
        values = torch.linalg.svdvals(merged.dense())
        assert float(values[6:].sum()) <= 1e-10 * float(values[0] + 1e-300)


@pytest.mark.parametrize("name", [*DELTAS, *WEIGHTS])
@pytest.mark.parametrize("size", [(), (5,)])
def test_vectors(name: str, size: tuple[int, ...]):
    method = lr.methods()[name]
    tasks = method.models[1] or 3
    inputs = [torch.randn(size, generator=torch.Generator().manual_seed(t)) for t in range(tasks)]
    base = {"base": torch.ones(size)} if method.base == "required" else {}
    merged = merge(name, inputs, **base)
    assert merged.shape == size
    assert bool(merged.isfinite().all())


# P18: determinism


@few
@given(seeds, st.sampled_from(RANDOM))
def test_randomness_depends_on_names_alone(seed: int, name: str):
    deltas = make.deltas(seed, shape=(20, 30))
    one = merge(name, deltas, seed=seed, name_of_tensor="a")
    assert torch.equal(one, merge(name, deltas, seed=seed, name_of_tensor="a"))
    assert not torch.equal(one, merge(name, deltas, seed=seed + 1, name_of_tensor="a"))
    assert not torch.equal(one, merge(name, deltas, seed=seed, name_of_tensor="b"))
    batch = [torch.stack([d, d]) for d in deltas]
    together = merge(name, batch, seed=seed, name_of_tensor=["b", "a"])
    assert torch.equal(together[1], one)
    threads = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        assert torch.equal(one, merge(name, deltas, seed=seed, name_of_tensor="a"))
    finally:
        torch.set_num_threads(threads)


@few
@given(seeds, st.sampled_from([*DELTAS, *WEIGHTS]))
def test_a_batch_is_its_matrices(seed: int, name: str):
    first, base = models(name, seed, "plain")
    second, other = models(name, seed + 7, "rank-deficient")
    names = {"name_of_tensor": ["x", "y"]}
    bases = {key: torch.stack([base[key], other[key]]) for key in base}
    together = merge(name, [torch.stack(pair) for pair in zip(first, second, strict=True)], **bases, **names)
    close(together[0], merge(name, first, name_of_tensor="x", **base), 1e-9)
    close(together[1], merge(name, second, name_of_tensor="y", **other), 1e-9)


@few
@given(
    seeds,
    st.sampled_from(
        [("full", n) for n in (*FACTORS, "iso_c", "tsv_m", "opcm", "cart")] + [("core", "dare_ties"), ("knots", "ties")]
    ),
)
def test_a_stack_of_experts_is_its_experts(seed: int, place: tuple[str, str]):
    """Adapters with a leading axis, of which one matrix has a lower rank."""
    space, name = place
    first, second = make.adapters(seed), make.adapters(seed + 1, "rank-deficient")
    pairs = [
        LowRank(torch.stack([f.A, g.A]), torch.stack([f.B, g.B]), f.scaling) for f, g in zip(first, second, strict=True)
    ]
    options = {"space": space, "seed": 3}
    merged = lr.merge_tensors(name, pairs, name_of_tensor=["x", "y"], **options, **{**DELTAS, **FACTORS}[name])
    assert isinstance(merged, LowRank)
    for i, (label, one) in enumerate((("x", first), ("y", second))):
        close(merged.dense()[i], merge(name, one, name_of_tensor=label, **options), 1e-9)


@few
@given(seeds, st.sampled_from(["task_arithmetic", "ties", "breadcrumbs", "dare_linear", "della", "iso_c", "tsv_m"]))
def test_numbers_may_differ_in_a_batch(seed: int, name: str):
    """weights, scale and densities as tensors over the batch are what each matrix alone gets."""
    deltas = [torch.stack(pair) for pair in zip(make.deltas(seed), make.deltas(seed + 1), strict=True)]
    parameters = lr.methods()[name].parameters
    options = {"weights": torch.tensor([[0.5, 1.0, 0.7], [1.5, 0.2, 0.9]]), "scale": torch.tensor([0.5, 2.0])}
    if "density" in parameters:
        options["density"] = torch.tensor([[0.5, 0.6, 0.7], [0.3, 0.8, 0.4]])
    together = merge(name, deltas, name_of_tensor=["x", "y"], **options)
    for i, label in enumerate("xy"):
        alone = {key: value[i].tolist() for key, value in options.items()}
        close(together[i], merge(name, [d[i] for d in deltas], name_of_tensor=label, **alone), 1e-6)


# P20: one at a time


class Lazy(Sequence[Tensor]):
    """A sequence that makes its items when they are asked for; ``most`` is how many were alive at a time."""

    def __init__(self, tensors: list[Tensor]):
        self.tensors = tensors
        self.made: list[weakref.ref[Tensor]] = []
        self.most = 0

    def __len__(self) -> int:
        return len(self.tensors)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        item = self.tensors[i].clone()
        self.made.append(weakref.ref(item))
        self.most = max(self.most, sum(made() is not None for made in self.made))
        return item


@few
@given(seeds, st.sampled_from([n for n in DELTAS if n != "opcm"]))
def test_streamed_inputs(seed: int, name: str):
    deltas = [d.float() for d in make.deltas(seed)]
    keys = [[t] for t in range(3)]
    one = run(lr.methods()[name], deltas, keys=keys, **DELTAS[name])
    other = run(lr.methods()[name], Lazy(deltas), keys=keys, **DELTAS[name])
    close(one, other, 1e-6)


@pytest.mark.parametrize(
    "name",
    ["linear", "task_arithmetic", "ties", "breadcrumbs", "breadcrumbs_ties", "dare_linear", "dare_ties", "della"],
)
def test_one_delta_is_held_at_a_time(name: str):
    lazy = Lazy(make.deltas(1, tasks=12))
    run(lr.methods()[name], lazy, keys=[[t] for t in range(12)], **{**DELTAS, **WEIGHTS}[name])
    assert lazy.most <= 3  # the one in work, its successor being made, and one in a generator's hands


@few
@given(seeds, st.sampled_from(["task_arithmetic", "ties", "ram"]))
def test_tiles_of_rows(seed: int, name: str):
    """What acts on elements alone may be given tiles, TIES with the threshold of the whole."""
    from mergekit_lr.methods.ties import trim_threshold

    deltas = [d.float() for d in make.deltas(seed)]
    limits = {"threshold": [trim_threshold([d], 31) for d in deltas]} if name == "ties" else {}
    tiles = [merge(name, [d[rows] for d in deltas], **limits) for rows in (slice(0, 4), slice(4, 9))]
    close(torch.cat(tiles), merge(name, deltas), 1e-6)
