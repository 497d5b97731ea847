"""Fast routes against plain definitions in float64, on inputs with defects; on each device that there is."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import given as make
import numpy as np
import pytest
import torch
from given import KINDS, close, dense
from lrgpu.clustering import centre_weights, kmeans
from lrgpu.polar import iterate, polar
from lrgpu.random import less, stream, uniform
from lrgpu.selection import kth_smallest, largest
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.della import probabilities
from mergekit_lr.methods.spaces import core_basis, knots_basis, run
from mergekit_lr.methods.ties import trim_threshold
from mergekit_lr.methods.tsv_m import whitened

Place = Callable[[Tensor], Any]


def back(array: Any) -> Tensor:
    """Any library's array as a CPU tensor."""
    return array.cpu() if isinstance(array, Tensor) else torch.from_numpy(array.get())


def numbers(*size: int, seed: int = 0) -> Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# Selection


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
@pytest.mark.parametrize("what", ["distinct", "equal", "zeros", "extremes"])
def test_order_statistics(place: Place, dtype: torch.dtype, what: str):
    x = numbers(3001).abs().to(dtype)
    if what == "equal":
        x = (4 * x).round() / 4
    elif what == "zeros":
        x[: 2 * len(x) // 3] = 0
    elif what == "extremes":
        x[:4] = torch.tensor([0.0, float("inf"), torch.finfo(dtype).max, torch.finfo(dtype).tiny], dtype=dtype)
    order = x.sort().values
    parts = [place(x[:1000]), place(x[1000:1001]), place(x[1001:].reshape(1000, 2))]
    for k in (1, 2, 1500, 2999, 3001):
        assert kth_smallest(parts, k) == float(order[k - 1])
    for k in (0, 3002):
        with pytest.raises(ValueError, match="k must be between 1 and 3001"):
            kth_smallest(parts, k)


def test_masks_have_exactly_as_many(place: Place):
    x = (3 * numbers(4, 50).abs()).round()
    mask = back(largest(place(x), [0, 7, 33, 50]))
    assert mask.sum(-1).tolist() == [0, 7, 33, 50]
    for row, chosen in zip(x, mask, strict=True):
        if 0 < chosen.sum() < 50:
            least = row[chosen].min()
            assert float(row[~chosen].max()) <= float(least)
            equal = (row == least).nonzero().flatten()  # of equal ones the first
            assert chosen[equal].int().diff().max() <= 0 if len(equal) > 1 else True


# Random numbers


def test_random_numbers_by_definition(place: Place):
    """The generator in plain integers."""

    def number(key: int, i: int) -> float:
        z = (key + (i + 1) * 0x9E3779B9) % 2**32
        z = (z ^ (z >> 16)) * 0x7FEB352D % 2**32
        z = (z + (key >> 32)) % 2**32
        z = (z ^ (z >> 15)) * 0x846CA68B % 2**32
        z = (z ^ (z >> 15)) * 0x31848BAB % 2**32
        return ((z ^ (z >> 16)) >> 8) / 2**24

    like = place(torch.zeros(1))
    for key in (0, 1234567, 2**64 - 1, stream(0, "layer", "model")):
        mine = back(uniform([key], 40, like))[0]
        exact = [number(key, i) for i in range(40)]
        assert mine.tolist() == exact
        assert back(uniform([key], 15, like, start=25))[0].tolist() == exact[25:]
        assert back(less([key], 0.3, 15, like, start=25))[0].tolist() == [x < 0.3 for x in exact[25:]]


def test_random_numbers_are_uniform_and_independent(place: Place):
    u = back(uniform([stream(0, "a"), stream(0, "b")], 200_000, place(torch.zeros(1)))).double()
    assert float(u.min()) >= 0
    assert float(u.max()) < 1
    counts = torch.histc(u[0], 100, 0, 1)
    assert float(((counts - 2000) ** 2 / 2000).sum()) < 160  # chi-square, 99 degrees: beyond it once in 10,000
    pairs = torch.corrcoef(torch.stack([u[0, :-1], u[0, 1:], u[1, :-1]]))
    assert float((pairs - torch.eye(3)).abs().max()) < 0.015


# Polar factor


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("kind", [*KINDS, "all zero"])
def test_polar_factor(place: Place, dtype: torch.dtype, kind: str):
    M = numbers(6, 5) * 0 if kind == "all zero" else sum(make.deltas(1, kind), start=torch.tensor(0.0))
    M = torch.stack([M, numbers(*M.shape, seed=3)])
    if kind == "ill-conditioned" and dtype == torch.float32:
        M = M * torch.logspace(0, 2, 7, dtype=torch.float64)  # what float32 can tell from zero
    P, norm, rank = polar(place(M.to(dtype)))
    U, S, Vh = torch.linalg.svd(M, full_matrices=False)
    keep = S > S[:, :1] * (max(M.shape[-2:]) * torch.finfo(dtype).eps)
    exact = (U * keep[:, None, :]) @ Vh
    assert back(rank).tolist() == keep.sum(-1).tolist()
    # A direction of relative size s is known to eps / s.
    least = float((S / S[:, :1].clamp_min(1e-300)).masked_fill(~keep, 1).min())
    torch.testing.assert_close(back(P).double(), exact, rtol=0, atol=30 * torch.finfo(dtype).eps / least)
    torch.testing.assert_close(back(norm), S.sum(-1), rtol=1e-5 if dtype == torch.float32 else 1e-10, atol=1e-30)


def test_polar_factor_by_products(place: Place):
    full = numbers(60, 40).float() * torch.logspace(0, -3, 40)
    U, _, Vh = torch.linalg.svd(full.double(), full_matrices=False)
    P = iterate(place(full))
    assert P is not None
    torch.testing.assert_close(back(P).double(), U @ Vh, rtol=0, atol=2e-3)
    deficient = (numbers(60, 5) @ numbers(5, 40, seed=1)).float()
    assert iterate(place(deficient)) is None
    assert iterate(place(torch.zeros(6, 4))) is None


def test_polar_refuses(place: Place):
    with pytest.raises(ValueError, match="NaN or an infinity"):
        polar(place(torch.tensor([[1.0, math.nan], [0.0, 1.0]])))
    with pytest.raises(TypeError, match="float32 or float64"):
        polar(place(torch.ones(2, 2).half()))


# Clustering


def test_kmeans_finds_the_best(place: Place):
    """Of all partitions of few points into two."""
    x = torch.cat([numbers(4, 3), numbers(4, 3, seed=2) + 2])
    weights = torch.tensor([1.0, 2, 1, 1, 3, 1, 1, 0.5], dtype=torch.float64)

    def cost(labels: tuple[int, ...]) -> float:
        total = 0.0
        for j in set(labels):
            member = torch.tensor([label == j for label in labels])
            mean = (weights[member, None] * x[member]).sum(0) / weights[member].sum()
            total += float((weights[member] * ((x[member] - mean) ** 2).sum(-1)).sum())
        return total

    best = min(cost((0, *rest)) for rest in itertools.product((0, 1), repeat=7) if any(rest))
    found = kmeans(place(x @ x.mT), 2, weights=place(weights))
    assert found.inertia == pytest.approx(best, rel=1e-9)
    assert cost(tuple(back(found.labels).tolist())) == pytest.approx(best, rel=1e-9)


@pytest.mark.parametrize("kind", ["zeros", "duplicates", "plain"])
@pytest.mark.parametrize("k", [1, 3, 6])
def test_no_cluster_is_empty(place: Place, kind: str, k: int):
    x = {"zeros": numbers(6, 4) * 0, "duplicates": numbers(1, 4).repeat(6, 1), "plain": numbers(6, 4)}[kind]
    found = kmeans(place(x @ x.mT), k)
    assert sorted(set(back(found.labels).tolist())) == list(range(k))
    assert bool(back(centre_weights(found, k)).isfinite().all())


def test_signs_in_clusters(place: Place):
    x = torch.cat([numbers(1, 8), 5 * numbers(1, 8, seed=5)]).repeat(4, 1)
    x = x * torch.tensor([1.0, 1, -1, 1, 1, -1, -1, -1], dtype=torch.float64)[:, None]
    found = kmeans(place(x @ x.mT), 2, signed=True)
    assert found.inertia == pytest.approx(0, abs=1e-9)
    assert kmeans(place(x @ x.mT), 2).inertia > 1


# Methods against their definitions


def ties_by_sorting(deltas: list[Tensor], weights: list[float], density: float) -> Tensor:
    stack = torch.stack(deltas)
    for t, delta in enumerate(deltas):
        drop = delta.numel() - int(density * delta.numel())
        stack[t].view(-1)[delta.abs().flatten().argsort()[:drop]] = 0
    weighted = stack * torch.tensor(weights, dtype=torch.float64)[:, None, None]
    sign = torch.where(weighted.sum(0) >= 0, 1.0, -1.0)
    agrees = weighted.sign() == sign
    divisor = (torch.tensor(weights, dtype=torch.float64)[:, None, None] * agrees).sum(0)
    return (weighted * agrees).sum(0) / divisor.where(divisor != 0, 1.0)


@pytest.mark.parametrize("kind", KINDS)
def test_ties(device: str, kind: str):
    deltas = make.deltas(5, kind)
    given = [d.to(device) for d in deltas]
    merged = lr.merge_tensors("ties", given, weights=[1.0, 0.5, 2.0], density=0.55)
    expected = ties_by_sorting(deltas, [1.0, 0.5, 2.0], 0.55)
    close(dense(merged).cpu(), expected, 1e-12)


def test_ties_of_a_whole_model():
    layers = [make.deltas(1), make.deltas(2, shape=(5, 4))]
    limits = [trim_threshold([layer[t] for layer in layers], 25) for t in range(3)]
    for t in range(3):
        everything = torch.cat([layer[t].flatten() for layer in layers]).abs().sort(descending=True).values
        assert limits[t] == float(everything[24])
    assert trim_threshold([layers[0][0]], 0) == math.inf


@pytest.mark.parametrize("density", [0.9, 0.5, 0.03])
@pytest.mark.parametrize("gamma", [0.0, 0.02, 0.2])
def test_breadcrumbs(device: str, density: float, gamma: float):
    delta = make.deltas(5, tasks=1)[0]
    order = delta.abs().flatten().argsort()
    size, kept = delta.numel(), int(density * delta.numel())
    top = min(int(gamma * size), size - kept)
    expected = torch.zeros(size, dtype=torch.float64)
    chosen = order[size - top - kept : size - top]
    expected[chosen] = delta.flatten()[chosen]
    merged = lr.merge_tensors("breadcrumbs", [delta.to(device)], density=density, gamma=gamma)
    assert torch.equal(dense(merged).cpu(), expected.reshape(delta.shape))


@pytest.mark.parametrize("name", ["dare_linear", "della_linear"])
def test_dropping_keeps_the_expected_delta(device: str, name: str):
    delta = make.deltas(5, tasks=1, shape=(6, 10))[0].to(device)
    batch = delta.expand(4000, 6, 10)
    merged = dense(lr.merge_tensors(name, [batch], density=0.6)).double()
    share = (merged != 0).double().mean(0)
    chance = probabilities(delta, 0.6, 0.15) if name == "della_linear" else torch.full_like(delta, 0.6)
    assert float((share - chance).abs().max()) < 0.04  # five standard errors
    assert float((merged.mean(0) - delta).abs().max()) < 0.08 * float(delta.abs().max())


def test_della_prefers_large_elements():
    delta = torch.tensor([[0.1, -3.0, 1.0, -0.5]], dtype=torch.float64)
    expected = torch.tensor([[0.35, 0.65, 0.55, 0.45]], dtype=torch.float64)
    torch.testing.assert_close(probabilities(delta, 0.5, 0.15), expected)


def test_arcee_fusion(device: str):
    base, delta = make.deltas(5, tasks=2)
    model = base + delta
    p, q = (torch.softmax(x, -1) + 1e-8 for x in (model, base))
    importance = delta.abs() * (p * (p / q).log()).sum(-1, keepdim=True)
    ordered = np.sort(importance.numpy().ravel())
    quarter, half, three = (ordered[int(x * 62)] for x in (0.25, 0.5, 0.75))
    expected = torch.where(importance >= half + 1.5 * (three - quarter), model, base)
    close(dense(lr.merge_tensors("arcee_fusion", [model.to(device)], base=base.to(device))).cpu(), expected, 1e-12)


@pytest.mark.parametrize("kind", ["plain", "ill-conditioned", "rank-deficient", "duplicate", "opposite", "zero task"])
@pytest.mark.parametrize("name", ["iso_c", "tsv_m", "cart", "svd", "adarank"])
def test_factors_and_dense_deltas_agree(device: str, name: str, kind: str):
    """Never forming the deltas gives what forming them does."""
    adapters = [LowRank(f.A.to(device), f.B.to(device), f.scaling) for f in make.adapters(7, kind, rank=3)]
    options: dict[str, dict[str, Any]] = {"cart": {"fraction": 0.2}, "svd": {"rank": 3}, "adarank": {"weights": 0.7}}
    given = options.get(name, {})
    factored = lr.merge_tensors(name, adapters, **given)
    assert isinstance(factored, LowRank)
    plain = lr.merge_tensors(name, [f.dense() for f in adapters], **given)
    close(factored.dense().cpu(), dense(plain).cpu(), 1e-6 if kind == "ill-conditioned" else 1e-8)


@pytest.mark.parametrize("kind", ["plain", "ill-conditioned", "rank-deficient", "zero task"])
def test_tsv_by_definition(device: str, kind: str):
    """U_hat diag(S) V_hat^T with U_hat, V_hat from SVDs of what each task really has."""
    deltas = make.deltas(9, kind, shape=(12, 10))
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    keep = [min(3, int((S > 1e-13 * S[0] * 12).sum()) if S[0] > 0 else 0) for _, S, _ in parts]
    U = torch.cat([u[:, :k] for (u, _, _), k in zip(parts, keep, strict=True)], -1)
    V = torch.cat([v[:k].mT for (_, _, v), k in zip(parts, keep, strict=True)], -1)
    S = torch.cat([s[:k] for (_, s, _), k in zip(parts, keep, strict=True)])
    hats = [u @ vh for u, _, vh in (torch.linalg.svd(X, full_matrices=False) for X in (U, V))]
    expected = hats[0] @ torch.diag(S) @ hats[1].mT
    close(dense(lr.merge_tensors("tsv_m", [d.to(device) for d in deltas])).cpu(), expected, 1e-9)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rank", [2, 14])
def test_joint_bases_by_definition(device: str, kind: str, rank: int):
    """Core Space and KnOTS from small cores are what the dense SVDs give, ranks beyond a side included."""
    adapters = [LowRank(f.A.to(device), f.B.to(device), f.scaling) for f in make.adapters(7, kind, rank=rank)]
    side_by_side = torch.cat([f.dense() for f in adapters], -1)
    S = torch.linalg.svdvals(side_by_side)
    knots = knots_basis(adapters)
    size = knots.S.shape[0]
    close(knots.S, S[:size], 1e-10)
    assert float(S[size:].sum()) <= 1e-11 * float(S[0])
    core = core_basis(adapters)
    for U, stack in ((core.U, torch.cat([f.B for f in adapters], -1)), (core.V, torch.cat([f.A for f in adapters]).mT)):
        close(U @ (U.mT @ stack), stack, 1e-10)


@pytest.mark.parametrize("angle", [1e-7, 4e-5, 1e-3])
def test_whitening_of_blocks_that_nearly_meet(angle: float):
    """A direction that two blocks share but for a small angle is two; one that they share but for rounding is one."""
    n, k = 600, 40
    Q = torch.linalg.qr(numbers(n, 2 * k)).Q
    first, second = Q[:, :k], Q[:, k:].clone()
    second[:, 0] = math.cos(angle) * first[:, 0] + math.sin(angle) * second[:, 0]
    X = torch.cat([first, second], 1)
    P = whitened(X.float()).double()
    rank = 2 * k - (angle < 1e-6)
    assert abs(float(P.square().sum()) - rank) < 1e-3
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    close(P, U[:, :rank] @ Vh[:rank], 0.02 if angle < 1e-4 else 1e-3)


@pytest.mark.parametrize("kind", ["plain", "duplicate", "zero task"])
@pytest.mark.parametrize("name", [name for name, rule in lr.methods().items() if rule.basis != "own"])
def test_any_basis(name: str, kind: str):
    """Methods that say so give the same in any orthonormal basis of Core Space, and linear ones without any."""
    adapters = [LowRank(f.A.float(), f.B.float(), f.scaling) for f in make.adapters(7, kind)]
    rule = lr.methods()[name]
    own = run(replace(rule, basis="own"), adapters, space="core")
    found = run(rule, adapters, space="core")
    assert isinstance(own, LowRank)
    assert isinstance(found, LowRank)
    close(found.dense(), own.dense(), 1e-5)


@pytest.mark.parametrize("kind", ["plain", "duplicate", "zero task"])
def test_spheres_of_adapters(kind: str):
    """What needs inner products alone gives of factors what it gives of dense tensors."""
    adapters = make.adapters(7, kind)
    for name, given in (
        ("karcher", adapters),
        ("multislerp", adapters),
        ("nuslerp", adapters[:2]),
        ("linear", adapters),
    ):
        merged = lr.merge_tensors(name, given)
        assert isinstance(merged, LowRank)
        close(merged.dense(), dense(lr.merge_tensors(name, [f.dense() for f in given])), 1e-7)


def test_float32_is_good_to_float32():
    for name, options in (("iso_c", {}), ("tsv_m", {}), ("ties", {"density": 0.5}), ("iso_cts", {}), ("opcm", {})):
        deltas = make.deltas(3, shape=(40, 30))
        exact = dense(lr.merge_tensors(name, deltas, **options))
        close(dense(lr.merge_tensors(name, [d.float() for d in deltas], **options)).double(), exact, 3e-5)


# What users get wrong


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("tie", {}, "there is no merge method 'tie', did you mean 'ties'?"),
        ("ties", {"densty": 0.5}, "ties has no parameter 'densty', did you mean 'density'?"),
        ("ties", {"density": 1.5}, "ties: 'density' must be from 0 to 1, got 1.5"),
        ("ties", {"weights": [1.0, 2.0]}, "ties: 'weights' has 2 values, expected one for each of 3 models"),
        ("ties", {"elect_on": "both"}, "ties: 'elect_on' must be one of 'weighted', 'unweighted', got 'both'"),
        ("ties", {"normalize": 1}, "ties: 'normalize' must be true or false, got 1"),
        ("ties", {"density": "half"}, "ties: 'density' must be a number, got 'half'"),
        ("slerp", {"t": 0.5}, "slerp merges 2 models, got 3"),
        ("svd", {}, "svd needs 'rank': give it as a parameter"),
        ("svd", {"rank": 2.5}, "svd: 'rank' must be a whole number, got 2.5"),
        ("cat", {}, "cat takes adapters (low-rank factors), got dense tensors"),
        ("ties", {"space": "core"}, "the space 'core' takes adapters (low-rank factors), got dense tensors"),
        ("model_stock", {}, "model_stock needs a base: give base="),
        ("karcher", {"base": torch.ones(9, 7)}, "karcher has no use for a base: leave it out"),
        ("della", {"density": 0.9}, "della: density 0.9"),
    ],
)
def test_messages(name: str, options: dict[str, Any], message: str):
    with pytest.raises(lr.LrmergeError) as caught:
        lr.merge_tensors(name, make.deltas(1), **options)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_shapes_must_agree():
    with pytest.raises(lr.LrmergeError, match=r"model 1 has shape \[2, 3\], model 0 \[3, 2\]"):
        lr.merge_tensors("ties", [torch.ones(3, 2), torch.ones(2, 3)])


def test_mergekits_names():
    deltas = make.deltas(1)
    ours = lr.merge_tensors("task_arithmetic", deltas, weights=[1.0, 2.0, 3.0], scale=0.5)
    assert torch.equal(
        dense(ours), dense(lr.merge_tensors("task_arithmetic", deltas, **{"weight": [1.0, 2.0, 3.0], "lambda": 0.5}))
    )


def test_methods_say_what_they_are():
    for name, method in lr.methods().items():
        assert method.description.endswith((".", ":")), name
        assert method.paper, name
        assert method.takes in ("weights", "deltas", "factors")
