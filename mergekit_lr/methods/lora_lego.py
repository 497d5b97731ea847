"""LoRA-LEGO (arXiv 2409.16167): adapters taken apart into rank-one units, clustered, and one unit kept per cluster.

A unit is a row a of A with its column b of B. Clustering needs the Gram matrix of the units alone (N^2 inner
products for a total rank N), after which an iteration does not depend on the layer's size.

The authors published no code, and what was published by others reads the paper in two ways: units are clustered as they
are (``feature="raw"``) or with a and b at length 1 each (``feature="unit"``). Both are here.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal, NamedTuple

import torch
from lrgpu.clustering import centre_weights, kmeans
from lrgpu.factored import truncate_product
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, stacked, unstacked
from mergekit_lr.methods.registry import PerModel, method


class Units(NamedTuple):
    """a (N, n) and b (N, m): the rank-one units of all adapters; weights (N,) of their adapters."""

    a: Tensor
    b: Tensor
    weights: Tensor


@method("lora_lego", paper="2409.16167", takes="factors")
def lora_lego(
    factors: Sequence[Delta],
    /,
    *,
    keys: Sequence[Sequence[int]] = (),
    weights: PerModel = 1.0,
    rank: int | None = None,
    feature: Literal["raw", "unit"] = "raw",
    canonical: Literal["none", "balance", "svd"] = "none",
    centroid: Literal["mean", "rank1"] = "mean",
    norm: Literal["max", "euclidean"] = "max",
    reweight: bool = True,
    rescale: bool = True,
    restarts: int = 10,
    iterations: int = 300,
) -> Delta:
    """Clusters the rank-one units of all adapters and keeps one unit per cluster.

    Formula:
        delta_t = sum_i b_(t,i) a_(t,i)^T
        clusters C_1, ..., C_k of all (a_(t,i), b_(t,i)) by k-means
        merged = sum_j mean_(C_j)(b) mean_(C_j)(a)^T, rescaled

    Args:
        factors: T ``LowRank`` of any ranks.
        keys: the seed of the clustering: of the first model, one for each matrix of the batch.
        weights: how much the units of each adapter count, above 0.
        rank: number of clusters, at most all units; without it the adapters' mean rank.
        feature: what is clustered: the units, or a and b at length 1.
        canonical: how an adapter is taken apart. "none": as its factors are. "balance": with |a| = |b|. "svd": into
            singular triplets, x and -x alike, so that the result does not depend on how the factors were rotated.
        centroid: a cluster's unit: the mean of its members, or the best rank-one approximation of their mean product.
        norm: of the reweighting.
        reweight: scale each mean to its members' mean norm, which averaging has lowered.
        rescale: multiply by sqrt(mean rank / number of clusters), which keeps the output's variance.
        restarts: runs of the k-means from other starts, of which the best counts.
        iterations: of a run, at most.

    Use when:
        Many adapters become one of a small rank and units that do the same in several of them should be kept
        once.

    Not when:
        The factors of one delta were rotated or come from an SVD of another tool: the result depends on how
        they were taken apart. canonical: svd removes that.

    Cost:
        O((m + n) N^2) once for N units, then k-means on the N x N Gram matrix.

    Example:
        {rank: 8}

    Raises:
        UsageError: a weight is not above 0, or ``rank`` is out of range.
    """
    if len(factors[0].shape) > 2:
        batch = unstacked(factors)
        seeds = keys[0] if keys else [0] * len(batch)
        options = {
            "rank": rank, "feature": feature, "canonical": canonical, "centroid": centroid, "norm": norm,
            "reweight": reweight, "rescale": rescale, "restarts": restarts, "iterations": iterations,
        }  # fmt: skip
        merged = [
            lora_lego(one, keys=[[seed]], weights=[_at(w, i) for w in weights], **options)
            for i, (one, seed) in enumerate(zip(batch, seeds, strict=True))
        ]
        return stacked(merged, factors[0])
    units = _units([f for f in factors if isinstance(f, LowRank)], weights, canonical)
    size = units.a.shape[0]
    k = max(1, round(size / len(factors))) if rank is None else rank
    if not 1 <= k <= size:
        raise UsageError(f"lora_lego: 'rank' must be from 1 to {size}, the number of units, got {k}")
    seed = keys[0][0] % (1 << 31) if keys else 0
    signed = canonical == "svd"
    gram = unit_gram(units.a, units.b, feature)
    found = kmeans(gram, k, weights=units.weights, seed=seed, restarts=restarts, iterations=iterations, signed=signed)
    Z = centre_weights(found, k, weights=units.weights)
    a, b = _centroids(units, Z, centroid)
    if reweight and centroid == "mean":
        factor = _norms(units.a, units.b, norm)
        now = _norms(a, b, norm)
        grown = (Z.abs().to(factor.dtype) @ factor) / now.where(now >= 1e-12, 1)
        grown = grown.where(now >= 1e-12, 1)[:, None]
        a, b = a * grown, b * grown
    if rescale:
        b = b * (size / len(factors) / k) ** 0.5
    return LowRank(a, b.mT)


def unit_gram(a: Tensor, b: Tensor, feature: str = "raw") -> Tensor:
    """The inner products (N, N) of the units' features, float64, from a (N, n) and b (N, m)."""
    a, b = a.double(), b.double()
    if feature == "unit":
        a, b = (x / x.norm(dim=-1, keepdim=True).clamp_min(1e-12) for x in (a, b))
    return a @ a.mT + b @ b.mT


def _units(factors: list[LowRank], weights: list[float], canonical: str) -> Units:
    a, b, counts = [], [], []
    for factor, weight in zip(factors, weights, strict=True):
        if not weight > 0:
            raise UsageError(f"lora_lego: every weight must be above 0, got {weight:g}")
        if canonical == "svd":
            factor = factor.balanced()
        root = abs(factor.scaling) ** 0.5  # half of the scaling to each side, so that a and b compare
        A = factor.A.to(factor.compute_dtype) * root
        B = factor.B.to(factor.compute_dtype).mT * (root if factor.scaling >= 0 else -root)
        if canonical == "balance":
            left, right = A.norm(dim=-1, keepdim=True), B.norm(dim=-1, keepdim=True)
            ratio = torch.where((left > 0) & (right > 0), (right / left.where(left > 0, 1)).sqrt(), 1.0)
            A, B = A * ratio, B / ratio.where(ratio > 0, 1)
        elif canonical == "svd":  # the signs of singular vectors are arbitrary
            sign = A.gather(-1, A.abs().argmax(-1, keepdim=True)).sign()
            A, B = A * sign, B * sign
        a.append(A)
        b.append(B)
        counts.append(torch.full((A.shape[0],), float(weight), dtype=torch.float64, device=A.device))
    return Units(torch.cat(a), torch.cat(b), torch.cat(counts))


def _centroids(units: Units, Z: Tensor, centroid: str) -> tuple[Tensor, Tensor]:
    """(k, n) and (k, m): each cluster's unit."""
    if centroid == "mean":
        return Z.to(units.a.dtype) @ units.a, Z.to(units.b.dtype) @ units.b
    pairs = []
    for row in Z:
        members = row != 0
        share = row[members].abs().to(units.a.dtype)[:, None]
        pairs.append(truncate_product((units.b[members] * share).mT, units.a[members], 1))
    return torch.cat([pair.A for pair in pairs]), torch.cat([pair.B.mT for pair in pairs])


def _norms(a: Tensor, b: Tensor, norm: str) -> Tensor:
    """(N,): of the whole unit [a; b]."""
    whole = torch.cat([a, b], -1)
    return whole.abs().amax(-1) if norm == "max" else whole.norm(dim=-1)


def _at(weight: float | Tensor, i: int) -> float:
    """The weight of matrix i of a batch: a number for all, or a tensor (..., 1, 1)."""
    return float(weight.reshape(-1)[i]) if isinstance(weight, Tensor) else weight
