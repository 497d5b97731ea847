"""The polar factor and the nuclear norm of a matrix, without its SVD.

With M = U S V^T of numerical rank rho: P = U_rho V_rho^T, a partial isometry, and ||M||_* = <P, M>. A direction
counts if its singular value exceeds max(m, n) eps sigma_1, or what the caller says. Directions below that are rounding,
and lifting them to one, as U V^T of a full SVD does, would fill P with noise: at rank n / 4 three times as much as
there is signal.

Routes, (..., m, n) each, n the shorter side:
Graded: float32 on a CPU, from n = 256 on. Eigenproblems in float32, corrected to first order: see :func:`graded`.
    Less than two thirds of the time of a float32 SVD where singular values fall slowly (one AVX2 core: 335 of 518 ms
    at 1024^2, 21 of 36 s at 4096^2) and nearly as much where most are below 0.03 sigma_1. Errors of P are alike:
    1e-6 to 1e-4 as the condition grows.
Gram: M^T M = V w V^T in float64 and P = M V w^(-1/2) V^T, in two thirds of the time of a float64 SVD.
SVD: where squaring the condition number has lost a direction that counts (float64 input, mostly).
Iteration, on a GPU: cubic Newton-Schulz steps with the scaling that is optimal for the interval in which the singular
    values lie (Chen and Chow, 2014, the "stable scaling"); products only, where eigenvalue problems wait on latency. It
    needs full rank, so its residual ||P^T P - I|| decides whether the result is taken.
"""

from __future__ import annotations

import math
from typing import NamedTuple

import torch

from lrgpu import backend
from lrgpu.backend import Array
from lrgpu.graded import lower_gram, orthogonal_columns

_LEAST = 1e-4  # of the bound on sigma_1: what the iteration can lift to 1 in float32
_ITERATED = 256  # the shorter side from which on the iteration, and the graded route, are worth it
_SECOND_ORDER = 1e-4  # of ||P||: how much of it the first order may leave out
_ROWS = 128  # of a tile that stays in the cache
_TOGETHER = 1 << 20  # elements of a batch: larger ones fill a device each on its own


class Polar(NamedTuple):
    """P (..., m, n) in the dtype of the matrix; nuclear_norm (...) float64; rank (...) of P, integers."""

    P: Array
    nuclear_norm: Array
    rank: Array


def polar(matrix: Array, *, floor: float | None = None) -> Polar:
    """The polar factor of each matrix on its numerical range, and its nuclear norm.

    Args:
        matrix: (..., m, n), float32 or float64; of any rank, zero included.
        floor: the share of its largest singular value up to which one is rounding; max(m, n) eps without it.

    Raises:
        TypeError: another dtype.
        ValueError: NaN or infinity.
    """
    library = backend.of(matrix)
    xp = library.xp
    if matrix.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"the matrix must be float32 or float64, got {matrix.dtype}")
    lead, (m, n) = tuple(matrix.shape[:-2]), matrix.shape[-2:]
    stack = matrix.reshape(math.prod(lead), m, n)
    if not bool(xp.isfinite(backend.squared_norm(stack)).all()):
        raise ValueError("the matrix holds a NaN or an infinity")
    turned = n > m
    tall = stack.swapaxes(-1, -2) if turned else stack
    P = library.empty(tuple(tall.shape), matrix.dtype, matrix)
    rank = library.empty((tall.shape[0],), xp.int64, matrix)
    step = max(1, _TOGETHER // max(1, m * n))
    least = max(m, n) * float(xp.finfo(matrix.dtype).eps) if floor is None else floor
    for start in range(0, tall.shape[0], step):
        part = slice(start, start + step)
        P[part], rank[part] = _factors(tall[part], least)
    norm = (P * tall).sum((-2, -1), dtype=xp.float64)
    P = P.swapaxes(-1, -2) if turned else P
    return Polar(P.reshape(*lead, m, n), norm.reshape(lead), rank.reshape(lead))


def _factors(M: Array, floor: float) -> tuple[Array, Array]:
    """(P, rank) of tall matrices (b, m, n), each by the cheapest route that is accurate for it."""
    library = backend.of(M)
    xp = library.xp
    single = M.dtype == xp.float32
    if single and M.shape[-1] >= _ITERATED and M.shape[0] == 1:
        P, rank = graded(M[0], floor) if library.on_cpu(M) else (iterate(M[0]), M.shape[-1])
        if P is not None:
            return P[None], library.put(torch.tensor([rank]), M)
    wide = library.cast(M, xp.float64)
    w, V = xp.linalg.eigh(wide.swapaxes(-1, -2) @ wide)
    top = xp.clip(w[:, -1:], 0, None)
    counts = w > floor**2 * top
    root = xp.where(counts, xp.where(counts, w, 1.0) ** -0.5, 0.0)
    P = wide @ ((V * root[:, None, :]) @ V.swapaxes(-1, -2))
    rank = counts.sum(-1)
    # The Gram's own rounding turns a direction by 2^-52 top / w. What counts must stay clear of that, and in
    # float64 what does not count cannot be told from it.
    doubtful = (w < (1e-9 if single else 1e-5) * top) & (counts | (not single))
    for i, doubt in enumerate(doubtful.any(-1).tolist()):
        if doubt:
            U, S, Vh = xp.linalg.svd(wide[i], full_matrices=False)
            rank[i] = (S > floor * S[0]).sum()
            P[i] = U[:, : int(rank[i])] @ Vh[: int(rank[i])]
    return library.cast(P, M.dtype), rank


def graded(M: Array, floor: float) -> tuple[Array | None, int]:
    """P and the rank of one tall float32 matrix (m, n), from eigenproblems in float32; no P where they do not do.

    With X = M V, its columns of lengths D nearly orthogonal (graded.py): X^T X = D (I + E) D, and to first order in E

        (X^T X)^(-1/2) = D^-1 - K,  K_ij = E_ij / (d_i + d_j),

    where no small difference d_i - d_j stands below, as it would for singular vectors. Cost: 4.2 products of M's size
    and the eigenproblem, and more of both for the short columns.
    """
    library = backend.of(M)
    xp = library.xp
    M = M / xp.clip(xp.amax(abs(M)), 1e-30, None)  # squares of very small numbers are none
    X, V, d = orthogonal_columns(M, floor)
    counts = d > floor * float(d.max())
    root = _inverse_root(lower_gram(X), d, counts)
    return (None, 0) if root is None else ((X @ root) @ V.swapaxes(-1, -2), int(counts.sum()))


def _inverse_root(gram: Array, d: Array, counts: Array) -> Array | None:
    """D^-1 - K from the lower triangle of X^T X and in its place; None where the first order is not enough.

    Rows and columns that do not count are 0.
    """
    xp = backend.of(gram).xp
    d = xp.where(counts, d, 1.0)
    inverse = counts / d
    squares = 0.0
    diagonal = gram.diagonal()
    for start in range(0, len(d), _ROWS):
        rows, before = slice(start, start + _ROWS), slice(0, start)
        tile, others = gram[rows, : start + _ROWS], slice(0, start + _ROWS)
        tile *= inverse[rows, None] * inverse[others]
        diagonal[rows] -= 1.0 * counts[rows]
        squares += float((tile * tile).sum())
        tile /= -(d[rows, None] + d[others])
        diagonal[rows] += inverse[rows]
        gram[before, rows] = tile[:, before].swapaxes(-1, -2)
    left_out = 0.375 * squares  # the next term of (I + E)^(-1/2) is 3/8 E^2
    return gram if left_out <= _SECOND_ORDER * math.sqrt(int(counts.sum())) else None


def iterate(M: Array) -> Array | None:
    """P of one tall matrix (m, n) of full rank by products alone, or None where it did not converge.

    With the singular values in [l, u] the best odd cubic is p(x) = k x (3 e^2 - x^2), e^2 = (l^2 + l u + u^2) / 3,
    which maps them into [k l (3 e^2 - l^2), 2 - that]. From l = 1e-4 twelve steps come to 1 - 1e-7.
    """
    library = backend.of(M)
    xp = library.xp
    gram = M.swapaxes(-1, -2) @ M
    bound = float(xp.sqrt(xp.linalg.norm(gram @ gram) ** 0.5)) * 1.0001  # >= sigma_1, rounding included
    if bound == 0 or not math.isfinite(bound):
        return None
    X = M / bound
    low, high = _LEAST, 1.0
    while high - low > 1e-6:
        e2 = (low * low + low * high + high * high) / 3
        k = 2 / (2 * e2**1.5 + low * (3 * e2 - low * low))
        X = 3 * k * e2 * X - k * (X @ (X.swapaxes(-1, -2) @ X))
        low = k * low * (3 * e2 - low * low)
        high = 2 - low
    gram = X.swapaxes(-1, -2) @ X
    X = 1.5 * X - 0.5 * (X @ gram)  # plain steps no longer lift anything, they only take rounding away
    residual = gram - library.put(torch.eye(M.shape[-1]), M)
    return X if float(xp.linalg.norm(residual)) < 1e-4 * math.sqrt(M.shape[-1]) else None
