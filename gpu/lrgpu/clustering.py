"""k-means from inner products alone, so that an iteration does not depend on how long the vectors are.

With the Gram matrix K of N vectors and centres mu_j = sum_l Z_jl x_l: <mu_j, x_i> = (Z K)_ji and
||mu_j||^2 = sum_l Z_jl (Z K)_jl. Building K costs O(N^2 d) once; each Lloyd step then O(k N^2), and restarts are
nearly free. K is float64: distances are differences of large numbers.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lrgpu import backend
from lrgpu.backend import Array

_RIGHT_ANGLE = 1e-10  # |cosine| below which two vectors count as orthogonal


class Clusters(NamedTuple):
    """labels (N,) integers in 0 ... k - 1; signs (N,) of +1 and -1, all +1 unless asked for; inertia: the weighted
    sum of squared distances from the centres."""

    labels: Array
    signs: Array
    inertia: float


def kmeans(
    gram: Array,
    k: int,
    *,
    weights: Array | None = None,
    seed: int = 0,
    restarts: int = 10,
    iterations: int = 300,
    signed: bool = False,
) -> Clusters:
    """Clusters N vectors into k by squared Euclidean distance: k-means++ starts, Lloyd steps, the best of all.

    Args:
        gram: (N, N) inner products, any float dtype; computed with in float64.
        k: number of clusters, 1 ... N. None of them is left empty.
        weights: (N,), positive; how much each vector counts. All alike without it.
        seed: of the starts.
        restarts: how many starts.
        iterations: Lloyd steps at most, from each start.
        signed: take x and -x for the same: each vector joins a centre with the sign that brings it closer.

    Raises:
        ValueError: ``k`` is out of range.
    """
    library = backend.of(gram)
    xp = library.xp
    size = gram.shape[-1]
    if not 1 <= k <= size:
        raise ValueError(f"k must be between 1 and {size}, got {k}")
    gram = library.cast(gram, xp.float64)
    ones = library.put(torch.ones(size, dtype=torch.float64), gram)
    weights = ones if weights is None else library.cast(weights, xp.float64)
    if k == size:
        return Clusters(library.put(torch.arange(size), gram), ones, 0.0)
    best: Clusters | None = None
    for restart in range(restarts):
        generator = torch.Generator().manual_seed(seed * 1_000_003 + restart)
        found = _lloyd(gram, weights, _start(gram, weights, k, generator, signed), iterations, signed)
        if best is None or found.inertia < best.inertia * (1 - 1e-12):
            best = found
    if best is None:
        raise ValueError(f"restarts must be 1 or more, got {restarts}")
    return best


def centre_weights(clusters: Clusters, k: int, *, weights: Array | None = None) -> Array:
    """Z (k, N), float64: the centres are Z @ vectors. Each row's magnitudes sum to 1."""
    library = backend.of(clusters.labels)
    member = clusters.labels[None, :] == library.put(torch.arange(k), clusters.labels)[:, None]
    Z = library.cast(member, library.xp.float64)
    Z = Z if weights is None else Z * weights
    return Z / Z.sum(-1)[:, None] * clusters.signs


def _start(gram: Array, weights: Array, k: int, generator: torch.Generator, signed: bool) -> Array:
    """(k, N) one-hot rows: the vectors to start from, each drawn by its distance from those before (k-means++)."""
    xp = backend.of(gram).xp
    diagonal = xp.diagonal(gram)
    chosen = [_draw(weights, generator)]
    distance = diagonal * 0 + math.inf
    while len(chosen) < k:
        inner = gram[chosen[-1]]
        inner = abs(inner) if signed else inner
        distance = xp.minimum(distance, xp.clip(diagonal - 2 * inner + diagonal[chosen[-1]], 0, None))
        chance = weights * distance
        chance[chosen] = 0
        if float(chance.sum()) <= 0:  # fewer distinct vectors than clusters: any other will do
            chance = weights + 0
            chance[chosen] = 0
        chosen.append(_draw(chance, generator))
    Z = backend.of(gram).empty((k, gram.shape[-1]), xp.float64, gram)
    Z[...] = 0
    for j, i in enumerate(chosen):
        Z[j, i] = 1
    return Z


def _draw(chance: Array, generator: torch.Generator) -> int:
    """An index, with probability proportional to ``chance``."""
    xp = backend.of(chance).xp
    limit = float(torch.rand((), generator=generator, dtype=torch.float64))
    total = xp.cumsum(chance, 0)
    return min(int((total <= limit * total[-1]).sum()), chance.shape[0] - 1)


def _lloyd(gram: Array, weights: Array, Z: Array, iterations: int, signed: bool) -> Clusters:
    library = backend.of(gram)
    xp = library.xp
    k, size = Z.shape
    diagonal = xp.diagonal(gram)
    everyone = library.put(torch.arange(size), gram)
    clusters: Clusters | None = None
    for _ in range(max(1, iterations)):
        inner = Z @ gram
        norms = (inner * Z).sum(-1)
        near = abs(inner) if signed else inner
        distances = diagonal - 2 * near + norms[:, None]
        labels = distances.argmin(0)
        closest = xp.clip(distances[labels, everyone], 0, None)
        for empty in sorted(set(range(k)) - set(labels.tolist())):
            # An empty cluster gets the vector that is farthest off, of those that are not alone.
            alone = xp.bincount(labels, minlength=k)[labels] == 1
            farthest = int(xp.where(alone, -1.0, closest).argmax())
            labels[farthest] = empty
            closest[farthest] = 0
        chosen = inner[labels, everyone]
        # At a right angle, up to rounding, either sign will do: +.
        opposed = chosen < -_RIGHT_ANGLE * xp.sqrt(abs(diagonal * norms[labels]))
        signs = xp.where(opposed, -1.0, 1.0) if signed else diagonal * 0 + 1
        settled = clusters is not None and bool((clusters.labels == labels).all() & (clusters.signs == signs).all())
        clusters = Clusters(labels, signs, float((weights * closest).sum()))
        if settled:
            break
        Z = centre_weights(clusters, k, weights=weights)
    assert clusters is not None
    return clusters
