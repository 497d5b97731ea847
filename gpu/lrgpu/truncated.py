"""Truncated SVD of a dense matrix, as close to the best one as asked, in few passes over the matrix.

A block Krylov basis (krylov.py) grows until what it could still win cannot better the error by ``tolerance``,
so the work adapts to the spectrum: a fixed number of passes misses 1 % on flat tails. The error itself is
exact and free: ||D||^2 - sum S^2. Where the rank is a good part of the whole, or the tolerance tight, leading
eigenvectors of a float32 Gram are faster, and exact but for rounding; close to full rank the SVD is LAPACK's.

Why Krylov and 5/8 k: on AVX2 in float32, at 2048^2 and k = 64, for power laws and low rank plus noise, blocks of
k/2 are below 1 % after 8 passes (256 columns in all), subspace iteration with a sketch of 1.5 k after 4 to 5
(384 to 480). The stopping rule spends some of that gain on certainty: blocks of k/2 are known to be good after 10
passes, blocks of 5/8 k after 8, wider ones no sooner. It is an extrapolation, tuned and tested on many kinds of
spectra, plateaus and repeated values too, not a proof.

Cost O(m n k) and 6 to 12 passes over D with such a block at the default tolerance.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from lrgpu import backend
from lrgpu.backend import Array
from lrgpu.graded import leading_directions, lengths
from lrgpu.krylov import Krylov, squared_error
from lrgpu.rank import RankRule

_MIN_BLOCK = 16  # columns; narrower products only wait for memory
_SMALL = 128  # rows or columns below which LAPACK takes no longer than the bookkeeping
_LARGEST_RANK = 0.25  # share of min(m, n): above it LAPACK is faster
_GRAM_RANKS = ((1e-2, 0.13), (1e-3, 0.09), (0.0, 0.045))  # tolerances, and the share from which on a Gram is faster
_GRAM_TOLERANCE = 1e-4  # the excess that a Gram in float32 tells from none
_SETTLED = 1e-4  # angle by which a space may still turn in a cycle where the tolerance is no more than that
_DIFFERENCE = 1e-2  # ||D||^2 - sum S^2 below this share of ||D||^2 is summed term by term: V is orthonormal to 1e-6
_NEGLIGIBLE = 1e-12  # of ||D||^2: the rounding of D
_BLOCKS = 6  # blocks of a basis before a rule that is undecided gets wider ones
_LARGEST_SHARE = 0.9  # of min(m, n): above it LAPACK is as fast as a Gram
_LARGE = 256  # rows and columns from which on that Gram is worth it
_LARGEST_BASIS = 0.75  # share of min(m, n): a basis that outgrows it gives up for LAPACK


class TruncatedSVD(NamedTuple):
    """U diag(S) Vh with k terms, and what is known about its error.

    U (..., m, k), S (..., k) descending (where it is above rounding of S[0]), Vh (..., k, n), in the dtype of
    the matrix; vectors that belong to a zero singular value may be zero. squared_norm = ||D||^2, residual =
    ||D - U S Vh|| and excess = estimate of residual / (best residual at rank k) - 1 (0 where exact) are float64
    arrays of the leading shape (...), 0-d for a single matrix. passes: how often D was read.
    """

    U: Array
    S: Array
    Vh: Array
    squared_norm: Array
    residual: Array
    passes: int
    excess: Array


def truncated_svd(
    matrix: Array,
    rank: int,
    *,
    tolerance: float = 0.01,
    squared_norm: Any = None,
    seeds: int | Sequence[int] = 0,
) -> TruncatedSVD:
    """The leading ``rank`` singular triplets.

    Args:
        matrix: (..., m, n), float32 or float64. Only read.
        rank: k; more than min(m, n) is taken as min(m, n).
        tolerance: the share by which ||D - U S Vh|| may exceed its least possible value (or 1e-6 ||D||, if
            that is more). Below 1e-4 it is not told from 1e-4 where a float32 Gram is taken; see ``excess``. From
            there down the directions are right too, also the last ones, but for rounding: at a tolerance of 1e-5
            alone the last of 50 may be turned halfway into the next, which whitening turns into percents.
        squared_norm: ||D||^2 if it is known (a number, or an array of the leading shape), else summed here.
        seeds: for the sketch; one for all matrices of the batch, or one for each. A matrix gives the same
            result alone and in a batch, up to rounding.

    Raises:
        TypeError: the matrix is neither float32 nor float64.
        ValueError: fewer than two axes, a negative rank, a wrong number of seeds, NaN or infinity.
    """
    if rank < 0:
        raise ValueError(f"rank must be 0 or more, got {rank}")
    stack, norms, seed_list = _validated(matrix, squared_norm, seeds)
    rank = min(rank, *matrix.shape[-2:])
    # On a CPU one matrix fills the cache, and each stops as soon as it can: one by one. A GPU wants many.
    step = 1 if backend.of(matrix).on_cpu(matrix) else max(1, stack.shape[0])
    parts = []
    for start in range(0, stack.shape[0], step):
        part = slice(start, start + step)
        parts += _fixed_rank(stack[part], rank, tolerance, norms[part], seed_list[part])
    return _joined(parts, matrix, norms, rank)


def truncated_svd_by_rule(
    matrix: Array,
    rule: RankRule,
    *,
    max_rank: int | None = None,
    tolerance: float = 0.01,
    squared_norm: Any = None,
    seeds: int | Sequence[int] = 0,
) -> TruncatedSVD:
    """The leading singular triplets, as many as ``rule`` asks for.

    The basis grows until the rule can be decided on the captured energy. That is exact, so the error is never
    more than the rule asks for; the rank may be slightly more than the exact singular values would need.

    Args:
        matrix: (..., m, n), float32 or float64.
        rule: what decides the rank.
        max_rank: the most, beside the rule's own limit.
        tolerance, squared_norm, seeds: as for :func:`truncated_svd`.

    Returns:
        As :func:`truncated_svd`. In a batch all have the largest rank of any; the rest is filled with zeros.

    Raises:
        TypeError, ValueError: as :func:`truncated_svd`.
    """
    if max_rank is not None:
        rule = replace(rule, max_rank=max_rank if rule.max_rank is None else min(max_rank, rule.max_rank))
    stack, norms, seed_list = _validated(matrix, squared_norm, seeds)
    parts = []
    for i, seed in enumerate(seed_list):
        parts.append(_ruled_rank(stack[i : i + 1], rule, tolerance, norms[i : i + 1], seed))
    return _joined(parts, matrix, norms, max((part.S.shape[-1] for part in parts), default=0))


def _fixed_rank(D: Array, rank: int, tolerance: float, squared_norm: Array, seeds: Sequence[int]) -> list[TruncatedSVD]:
    """One result for each matrix of the stack (b, m, n). All go in step; each leaves when it is good enough."""
    batch, rows, columns = D.shape
    full = min(rows, columns)
    width = max(_MIN_BLOCK, -(-5 * rank // 64) * 8)  # 5/8 of the rank, in multiples of 8
    if rank == 0:
        return [_empty(D[i : i + 1], squared_norm[i : i + 1]) for i in range(batch)]
    results: dict[int, TruncatedSVD] = {}
    largest = next(share for least, share in _GRAM_RANKS if tolerance >= least) if _has_gram(D) else _LARGEST_RANK
    if full > _SMALL and rank <= largest * full:
        krylov = Krylov(D, squared_norm, backend.normal(seeds, columns, width, D, D.dtype), seeds)
        while len(results) < batch and krylov.width + width <= _LARGEST_BASIS * full:
            krylov.cycle()
            if krylov.width >= rank:
                _collect(results, krylov, rank, tolerance)
    for i in range(batch):
        if i not in results:
            one = slice(i, i + 1)
            found = _from_gram(D[one], rank, tolerance, squared_norm[one])
            results[i] = _exact(D[one], rank, squared_norm[one]) if found is None else found
    return [results[i] for i in range(batch)]


def _from_gram(D: Array, rank: int, tolerance: float, squared_norm: Array) -> TruncatedSVD | None:
    """From the leading eigenvectors V of the Gram of a float32 matrix (1, m, n), on a CPU: the SVD of D V.

    They are exact but for rounding, and so is the least possible error. The SVD, which squares nothing, parts the last
    of them from the first of some more. None where rounding leaves open whether the error is within the tolerance, and
    where LAPACK is as fast.
    """
    library = backend.of(D)
    xp = library.xp
    if not _has_gram(D) or rank > _LARGEST_SHARE * min(D.shape[-2:]) or float(squared_norm[0]) == 0:
        return None
    wide = D.shape[-1] > D.shape[-2]
    size = float(xp.sqrt(squared_norm[0]))
    M = (D[0].swapaxes(-1, -2) if wide else D[0]) / size
    V, squares, left, slack = leading_directions(M, min(rank + max(8, rank // 8), M.shape[-1]))
    least = left - slack + float(squares[rank:].sum())
    Y = M @ V
    exact = library.cast(Y, xp.float64)
    values, turn = xp.linalg.eigh(exact.swapaxes(-1, -2) @ exact)
    turn = library.cast(xp.flip(turn, (-1,))[:, :rank], D.dtype)
    X, V = Y @ turn, V @ turn
    S = lengths(X)
    X = X / xp.clip(S, 1e-30, None)
    U, Vh = (V, X.swapaxes(-1, -2)) if wide else (X, V.swapaxes(-1, -2))
    U, S, Vh = U[None], S[None], Vh[None]
    squared = 1 - values[None, -rank:].sum(-1)
    if float(squared[0]) < _DIFFERENCE:
        squared = squared_error(M.swapaxes(-1, -2)[None] if wide else M[None], U, S, Vh)
    excess = xp.sqrt(xp.clip(squared / max(least, 1e-300), 1.0, None)) - 1
    if float(excess[0]) > max(tolerance, _GRAM_TOLERANCE) and float(squared[0]) > _NEGLIGIBLE:
        return None
    return TruncatedSVD(U, size * S, Vh, squared_norm, xp.sqrt(squared * squared_norm), 2, excess)


def _has_gram(D: Array) -> bool:
    """Whether eigenvectors of the Gram of D (b, m, n) may be a start."""
    library = backend.of(D)
    return library.on_cpu(D) and D.dtype == library.xp.float32 and min(D.shape[-2:]) >= _LARGE


def _collect(results: dict[int, TruncatedSVD], krylov: Krylov, rank: int, tolerance: float) -> None:
    """Add the results of those matrices that are good enough now and have none yet."""
    done, excess = _good_enough(krylov, rank, tolerance)
    finished = [i for i, good in enumerate(done.tolist()) if good and i not in results]
    whole = len(finished) == len(done)
    for which in [slice(None)] if whole else [slice(i, i + 1) for i in finished]:
        U, S, Vh, squared = krylov.approximation(rank, which)
        residual = backend.of(S).xp.sqrt(squared)
        for j, i in enumerate(finished if whole else [which.start]):
            one = slice(j, j + 1)
            results[i] = TruncatedSVD(
                U[one], S[one], Vh[one], krylov.squared_norm[i : i + 1], residual[one], krylov.passes, excess[i : i + 1]
            )


def _good_enough(krylov: Krylov, rank: int, tolerance: float) -> tuple[Array, Array]:
    """(whether the error is within tolerance of the best, estimate of its relative excess), each (b,)."""
    xp = backend.of(krylov.D).xp
    to_come, left = krylov.outlook(rank)
    enough = to_come <= left * (1 - (1 + tolerance) ** -2)
    if tolerance <= _GRAM_TOLERANCE:  # then directions count, of which the energy tells little
        enough &= krylov.turned(rank) <= _SETTLED
    negligible = max((8 * xp.finfo(krylov.D.dtype).eps) ** 2, 2.0**-46) * krylov.squared_norm
    done = enough | (to_come <= negligible)
    best = xp.clip(left - to_come, 1e-300, None)
    return done, xp.where(to_come < left, xp.sqrt(left / best) - 1, 0.0)


def _ruled_rank(D: Array, rule: RankRule, tolerance: float, squared_norm: Array, seed: int) -> TruncatedSVD:
    """The rank that the rule finds for one matrix (1, m, n).

    While the rule is undecided the blocks get wider: each new start takes along the right singular vectors
    found so far, so that nothing found is lost.
    """
    xp = backend.of(D).xp
    full, columns = min(D.shape[-2:]), D.shape[-1]
    norm = float(squared_norm[0])
    width, passes = 2 * _MIN_BLOCK, 0
    block = backend.normal([seed], columns, width, D, D.dtype)
    while full > _SMALL and width <= _LARGEST_RANK * full:
        krylov = Krylov(D, squared_norm, block, [seed], passes)
        while krylov.width < _BLOCKS * width and krylov.width + width <= _LARGEST_BASIS * full:
            krylov.cycle()
            rank = rule.choose(xp.sqrt(krylov.ritz[0]), norm, full)
            if rank == 0:
                return _empty(D, squared_norm)
            results: dict[int, TruncatedSVD] = {}
            if rank is not None and krylov.width > rank:
                _collect(results, krylov, rank, tolerance)
            if results:
                return results[0]
        passes, width = krylov.passes, 2 * width
        found = krylov.approximation(min(krylov.width, width // 2), slice(None)).Vh.swapaxes(-1, -2)
        fresh = backend.normal([seed], columns, width - found.shape[-1], D, D.dtype)
        block = xp.concatenate((found, fresh * columns**-0.5), -1)
    whole = _exact(D, full, squared_norm, passes)
    rank = rule.choose(whole.S[0], norm, full)
    return _cut(whole, full if rank is None else rank)


def _exact(D: Array, rank: int, squared_norm: Array, passes: int = 0) -> TruncatedSVD:
    """The same by LAPACK, in float64: float32 alone gives D back only to 1e-6, for 2/3 of the time."""
    library = backend.of(D)
    factors = library.xp.linalg.svd(library.cast(D, library.xp.float64), full_matrices=False)
    U, S, Vh = (library.cast(x, D.dtype) for x in factors)
    return _cut(TruncatedSVD(U, S, Vh, squared_norm, 0 * squared_norm, passes + 1, 0 * squared_norm), rank)


def _cut(whole: TruncatedSVD, rank: int) -> TruncatedSVD:
    """An exact SVD, cut off at ``rank``: its error is the tail of its own singular values."""
    library = backend.of(whole.S)
    tail = library.cast(whole.S[..., rank:], library.xp.float64)
    residual = library.xp.sqrt((tail * tail).sum(-1))
    U, S, Vh = whole.U[..., :rank], whole.S[..., :rank], whole.Vh[..., :rank, :]
    return whole._replace(U=U, S=S, Vh=Vh, residual=residual)


def _empty(D: Array, squared_norm: Array) -> TruncatedSVD:
    """Rank 0 of the stack (b, m, n): no vectors, and all of the norm is left."""
    U, Vh = D[..., :0], D[..., :0, :]
    return TruncatedSVD(U, U[..., 0, :], Vh, squared_norm, backend.of(D).xp.sqrt(squared_norm), 0, 0 * squared_norm)


def _validated(matrix: Array, squared_norm: Any, seeds: int | Sequence[int]) -> tuple[Array, Array, list[int]]:
    """The matrices as one stack (b, m, n), their squared norms (b,) in float64, one seed for each."""
    library = backend.of(matrix)
    xp = library.xp
    if matrix.dtype not in (xp.float32, xp.float64):
        raise TypeError(f"the matrix must be float32 or float64, got {matrix.dtype}")
    if len(matrix.shape) < 2:
        raise ValueError(f"the matrix must have at least two axes, got shape {tuple(matrix.shape)}")
    stack = matrix.reshape(math.prod(matrix.shape[:-2]), *matrix.shape[-2:])
    if squared_norm is None:
        norms = backend.squared_norm(stack)
    else:
        norms = library.empty((stack.shape[0],), xp.float64, stack)
        norms[...] = squared_norm.reshape(-1) if hasattr(squared_norm, "reshape") else squared_norm
    if not bool(xp.isfinite(norms).all()):
        raise ValueError("the matrix holds a NaN or an infinity")
    seed_list = [seeds] * stack.shape[0] if isinstance(seeds, int) else list(seeds)
    if len(seed_list) != stack.shape[0]:
        raise ValueError(f"{len(seed_list)} seeds for {stack.shape[0]} matrices")
    return stack, norms, seed_list


def _joined(parts: list[TruncatedSVD], matrix: Array, norms: Array, rank: int) -> TruncatedSVD:
    """One result of the leading shape of ``matrix`` from one for each matrix, filled up to ``rank``."""
    library = backend.of(matrix)
    lead, (rows, columns) = tuple(matrix.shape[:-2]), matrix.shape[-2:]
    batch = len(parts)
    if batch == 1:
        U, S, Vh = (x.reshape(*lead, *x.shape[1:]) for x in parts[0][:3])
    else:
        U = library.empty((batch, rows, rank), matrix.dtype, matrix)
        S = library.empty((batch, rank), matrix.dtype, matrix)
        Vh = library.empty((batch, rank, columns), matrix.dtype, matrix)
        for i, part in enumerate(parts):
            k = part.S.shape[-1]
            U[i, :, k:], S[i, k:], Vh[i, k:] = 0, 0, 0
            U[i, :, :k], S[i, :k], Vh[i, :k] = part.U[0], part.S[0], part.Vh[0]
        U, S, Vh = (x.reshape(*lead, *x.shape[1:]) for x in (U, S, Vh))
    residual, excess = 0 * norms, 0 * norms
    for i, part in enumerate(parts):
        residual[i], excess[i] = part.residual[0], part.excess[0]
    passes = max((part.passes for part in parts), default=0)
    return TruncatedSVD(U, S, Vh, norms.reshape(lead), residual.reshape(lead), passes, excess.reshape(lead))
