"""How much of a vector lies along any single eigenvector of a symmetric operator, without its eigenvectors.

Lanczos from a unit vector x gives the Gauss quadrature of x's spectral measure: nodes t_j and weights w_j, where the
measure has an atom of mass <x, q_i>^2 at every eigenvalue. By the Chebyshev-Markov-Stieltjes inequalities no atom is
heavier than two neighbouring weights together; a converged node carries its atom's mass exactly. So after some tens
of products the heaviest atom is known, or known to be below a threshold, at O(steps) products instead of O(m^3).

Source: Golub and Meurant, Matrices, Moments and Quadrature with Applications, sections 4 and 6.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from lrgpu import backend
from lrgpu.backend import Array

_CONVERGED = 1e-5  # residual of a node over the norm of the operator, below which its weight is an atom's mass


class HeaviestAtom(NamedTuple):
    """For each vector: mass (k,), the heaviest weight seen; bound (k,), above the mass of every atom; and whether both
    agree about the threshold, decided (k,)."""

    mass: Array
    bound: Array
    decided: Array


def heaviest_atom(
    product: Callable[[Array], Array], vectors: Array, *, threshold: float, max_steps: int = 120, every: int = 10
) -> HeaviestAtom:
    """The largest <x, q_i>^2 over all eigenvectors q_i of a positive semidefinite operator, per column x.

    Args:
        product: X (m, k) -> M X (m, k).
        vectors: unit columns (m, k).
        threshold: what the largest mass is compared with; steps end once all columns are decided.
        max_steps: of Lanczos. every: how many steps between looks.

    Returns:
        float64 arrays; ``mass >= threshold`` or ``bound < threshold`` where ``decided``.
    """
    library = backend.of(vectors)
    xp = library.xp
    rows, count = vectors.shape
    basis = library.empty((count, rows, max_steps), xp.float64, vectors)  # Lanczos vectors of every column
    basis[:, :, 0] = vectors.swapaxes(0, 1)
    alphas: list[Array] = []
    betas: list[Array] = []
    result = None
    for step in range(1, max_steps + 1):
        last = basis[:, :, step - 1]
        image = library.cast(product(library.cast(last, vectors.dtype).swapaxes(0, 1)), xp.float64).swapaxes(0, 1)
        alphas.append((last * image).sum(-1))
        held = basis[:, :, :step]
        for _ in range(2):  # orthogonal to every earlier vector, twice: Lanczos vectors lose it otherwise
            image = image - (held @ (held.swapaxes(-1, -2) @ image[:, :, None]))[:, :, 0]
        betas.append(xp.sqrt((image * image).sum(-1)))
        if step % every == 0 or step == max_steps:
            result = _look(alphas, betas, count, threshold, vectors)
            if bool(result.decided.all()):
                break
        if step < max_steps:
            # Where a space is exhausted the next vector is zero and adds nodes of no weight.
            scale = xp.where(betas[-1] > 1e-12 * xp.abs(alphas[0]), betas[-1], xp.inf)
            basis[:, :, step] = image / scale[:, None]
    assert result is not None
    return result


def _look(alphas: list[Array], betas: list[Array], count: int, threshold: float, like: Array) -> HeaviestAtom:
    """Nodes and weights of every column's tridiagonal matrix so far."""
    library = backend.of(like)
    xp = library.xp
    steps = len(alphas)
    tridiagonal = library.empty((count, steps, steps), xp.float64, like)
    tridiagonal[...] = 0
    for i, alpha in enumerate(alphas):
        tridiagonal[:, i, i] = alpha
        if i + 1 < steps:
            tridiagonal[:, i, i + 1] = tridiagonal[:, i + 1, i] = betas[i]
    nodes, vectors = xp.linalg.eigh(tridiagonal)
    weights = vectors[:, 0, :] ** 2
    residual = betas[-1][:, None] * xp.abs(vectors[:, -1, :])
    norm = xp.abs(nodes)[:, -1:]
    exact = residual <= _CONVERGED * xp.where(norm > 0, norm, 1.0)
    heaviest, converged = _greatest(weights), _greatest(xp.where(exact, weights, 0.0))
    pairs = weights[:, 1:] + weights[:, :-1] if steps > 1 else weights
    # Once all nodes have converged their weights are the masses.
    bound = xp.where(exact.all(1), heaviest, _greatest(pairs))
    return HeaviestAtom(heaviest, bound, (converged >= threshold) | (bound < threshold))


def _greatest(values: Array) -> Array:
    """The maximum over the last axis."""
    return backend.of(values).xp.amax(values, -1)
