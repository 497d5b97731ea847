"""Algebra of B @ A from its factors alone: SVD, truncation, norms, inner products, stacking.

B (..., m, r), A (..., r, n). No m x n matrix is ever formed: cost O((m + n) r^2 + r^3) instead of
O(m n min(m, n)). Two routes to the SVD:

Gram: with B^T B = V w V^T and H = V sqrt(w), the eigenproblem H^T (A A^T) H = P s^2 P^T gives
    U = B V w^(-1/2) P and Vh = s^(-1) P^T H^T A. Two r x r eigenproblems in float64 and four thin products.
QR: B = Q_B R_B, A^T = Q_A R_A and the SVD of R_B R_A^T, all in float64: four times slower, exact for any
    input. Taken, matrix by matrix, where a Gram is too ill-conditioned: dependent, duplicate or zero columns.

A Gram squares the condition number of a factor. Scaling a column is harmless, so the test is on Grams scaled
to a unit diagonal: QR where least over greatest eigenvalue, multiplied over both, is below 1e-6. What one
factor stretches the other may undo, and products in float32 then lose that much: 1e3 at most. float64 factors
always go by QR, which alone has their accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from lrgpu import backend
from lrgpu.backend import Array

_WORST = 1e-6  # product of least over greatest eigenvalue of both Grams, scaled to a unit diagonal: below, QR


class SVD(NamedTuple):
    """U (..., m, k) and Vh (..., k, n) orthonormal, S (..., k) descending."""

    U: Array
    S: Array
    Vh: Array


class Truncated(NamedTuple):
    """Balanced factors, B^T B = A A^T, of a product's best approximation, and ||product - B @ A|| (...)."""

    B: Array
    A: Array
    residual: Array


def svd_of_product(B: Array, A: Array, *, rank: int | None = None) -> SVD:
    """The SVD of B @ A, thin, cut to the leading ``rank``.

    Args:
        B: (..., m, r), any float dtype.
        A: (..., r, n), the same leading shape.
        rank: at most this many triplets; without it min(r, m, n).

    Returns:
        float32 (float64 for float64 factors). Where B @ A has a lower rank, S ends in zeros or rounding.

    Raises:
        ValueError: the factors do not fit together.
    """
    U, S, Vh = _decompose(B, A, rank)
    return SVD(U, backend.of(B).cast(S[..., : U.shape[-1]], U.dtype), Vh)


def truncate_product(B: Array, A: Array, rank: int) -> Truncated:
    """The best approximation of B @ A of this rank, as balanced factors.

    Args:
        B: (..., m, r), any float dtype.
        A: (..., r, n), the same leading shape.
        rank: k; at or above the true rank nothing is lost.

    Returns:
        B (..., m, k'), A (..., k', n) with k' = min(k, r, m, n), float32 (float64 for float64 factors), and
        the exact residual in float64, from the singular values that were cut off.

    Raises:
        ValueError: the factors do not fit together.
    """
    library = backend.of(B)
    U, S, Vh = _decompose(B, A, rank)
    k = U.shape[-1]
    root = library.cast(library.xp.sqrt(S[..., :k]), U.dtype)
    tail = S[..., k:]
    residual = library.xp.sqrt((tail * tail).sum(-1))
    return Truncated(U * root[..., None, :], root[..., :, None] * Vh, residual)


def balance(B: Array, A: Array) -> tuple[Array, Array]:
    """Factors of the same product with B^T B = A A^T, of rank min(r, m, n): the least ||B||^2 + ||A||^2."""
    B, A, _ = truncate_product(B, A, B.shape[-1])
    return B, A


def stack(factors: Sequence[tuple[Array, Array]]) -> tuple[Array, Array]:
    """Factors of a sum of products: sum_t B_t A_t = [B_1 | B_2 | ...] [A_1; A_2; ...]."""
    xp = backend.of(factors[0][0]).xp
    return xp.concatenate([B for B, _ in factors], -1), xp.concatenate([A for _, A in factors], -2)


def inner(B1: Array, A1: Array, B2: Array, A2: Array) -> Array:
    """The Frobenius inner product <B1 A1, B2 A2> = sum of (B1^T B2) * (A1 A2^T), float64, shape (...).

    For the norm of a difference stack the factors and use :func:`squared_norm`: the expanded form
    ||X||^2 - 2 <X, Y> + ||Y||^2 loses half the digits where X and Y are close.
    """
    B1, A1, B2, A2 = (_double(x) for x in (B1, A1, B2, A2))
    return ((_turned(B1) @ B2) * (A1 @ _turned(A2))).sum(-1).sum(-1)


def squared_norm(B: Array, A: Array) -> Array:
    """||B A||^2 = sum of (B^T B) * (A A^T), float64, shape (...)."""
    return inner(B, A, B, A)


def _decompose(B: Array, A: Array, rank: int | None) -> tuple[Array, Array, Array]:
    """(U (..., m, k), all min(r, m, n) singular values in float64, Vh (..., k, n)) of B @ A."""
    if B.shape[-1] != A.shape[-2] or B.shape[:-2] != A.shape[:-2]:
        raise ValueError(f"B {tuple(B.shape)} and A {tuple(A.shape)} do not make a product")
    library = backend.of(B)
    xp = library.xp
    dtype = xp.float64 if xp.float64 in (B.dtype, A.dtype) else xp.float32
    lead, (rows, r), columns = tuple(B.shape[:-2]), B.shape[-2:], A.shape[-1]
    full = min(r, rows, columns)
    k = full if rank is None else min(rank, full)
    batch = math.prod(lead)
    B, A = (library.cast(x, dtype).reshape(batch, *x.shape[-2:]) for x in (B, A))
    if full == 0 or batch == 0:
        S = library.empty((batch, full), xp.float64, B)
        return _shaped(lead, B[..., :k], S, A[..., :k, :])
    if full < r or dtype == xp.float64:  # a Gram of more columns than rows is singular
        return _shaped(lead, *_qr_route(B, A, k))
    gram_B, gram_A = _gram(B), _gram(_turned(A))
    sound = _condition(gram_B) * _condition(gram_A) > _WORST
    if bool(sound.all()):
        return _shaped(lead, *_gram_route(B, A, gram_B, gram_A, k))
    if not bool(sound.any()):
        return _shaped(lead, *_qr_route(B, A, k))
    routes = [_gram_route(B[sound], A[sound], gram_B[sound], gram_A[sound], k), _qr_route(B[~sound], A[~sound], k)]
    results = []
    for by_gram, by_qr in zip(*routes, strict=True):
        whole = library.empty((batch, *by_gram.shape[1:]), by_gram.dtype, B)
        whole[sound], whole[~sound] = by_gram, by_qr
        results.append(whole)
    return _shaped(lead, *results)


def _gram_route(B: Array, A: Array, gram_B: Array, gram_A: Array, k: int) -> tuple[Array, Array, Array]:
    library = backend.of(B)
    xp = library.xp
    scale = _lengths(gram_B)  # B / scale has unit columns, A * scale the same product with it
    w, V = xp.linalg.eigh(gram_B / (scale[:, :, None] * scale[:, None, :]))
    root = xp.sqrt(w)[:, None, :]
    H = V * root * scale[:, :, None]
    squares, P = xp.linalg.eigh(_turned(H) @ gram_A @ H)
    S = xp.sqrt(xp.clip(xp.flip(squares, (-1,)), 0, None))
    P = xp.flip(P, (-1,))[..., :k]
    X = (V / (root * scale[:, :, None])) @ P
    # A value that rounding has made zero has no vector: its row is zero, as is its share of the product.
    leading = S[:, :k, None]
    Y = _turned(H @ P) / xp.where(leading > 0, leading, xp.inf)
    return B @ library.cast(X, B.dtype), S, library.cast(Y, A.dtype) @ A


def _qr_route(B: Array, A: Array, k: int) -> tuple[Array, Array, Array]:
    library = backend.of(B)
    linalg = library.xp.linalg
    Q_B, R_B = linalg.qr(_double(B))
    Q_A, R_A = linalg.qr(_turned(_double(A)))
    U, S, Vh = linalg.svd(R_B @ _turned(R_A), full_matrices=False)
    U, Vh = Q_B @ U[..., :k], Vh[..., :k, :] @ _turned(Q_A)
    return library.cast(U, B.dtype), S, library.cast(Vh, A.dtype)


def _gram(X: Array) -> Array:
    """X^T X in float64 from one copy of X in float64."""
    X = _double(X)
    return _turned(X) @ X


def _condition(gram: Array) -> Array:
    """Least over greatest eigenvalue (b,) of the Grams (b, r, r), scaled to a unit diagonal."""
    xp = backend.of(gram).xp
    scale = _lengths(gram)
    w = xp.linalg.eigvalsh(gram / (scale[:, :, None] * scale[:, None, :]))
    return xp.where(w[:, -1] > 0, w[:, 0] / xp.where(w[:, -1] > 0, w[:, -1], 1.0), 0.0)


def _lengths(gram: Array) -> Array:
    """Lengths (b, r) of the vectors whose Grams these are, 1 for those that are zero."""
    xp = backend.of(gram).xp
    diagonal = xp.diagonal(gram, 0, -2, -1)
    return xp.sqrt(xp.where(diagonal > 0, diagonal, 1.0))


def _double(x: Array) -> Array:
    library = backend.of(x)
    return library.cast(x, library.xp.float64)


def _turned(x: Array) -> Array:
    return x.swapaxes(-1, -2)


def _shaped(lead: tuple[int, ...], U: Array, S: Array, Vh: Array) -> tuple[Array, Array, Array]:
    """The same with the leading shape ``lead`` in the place of the batch axis."""
    return U.reshape(*lead, *U.shape[1:]), S.reshape(*lead, *S.shape[1:]), Vh.reshape(*lead, *Vh.shape[1:])
