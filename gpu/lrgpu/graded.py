"""Orthogonal columns of a matrix whose singular values differ by much, by eigenproblems in float32.

M^T M = V w V^T makes the columns of X = M V orthogonal, but a float32 Gram keeps those that are short against the
longest only roughly apart. They get an eigenproblem of their own, the shortest of them one again: each resolves what
is within 0.03 of its longest column. Then X^T X = D (I + E) D with the lengths D and a small E. Cost for (m, n): 1.6
products of M's size, an eigenproblem of n, and the same for the k short columns of each level.
"""

from __future__ import annotations

from typing import NamedTuple

from lrgpu import backend
from lrgpu.backend import Array
from lrgpu.eigen import every, leading

_RESOLVED = 0.03  # of the longest column: what an eigenproblem of a Gram in float32 tells from the others
_CLEAR = 0.01  # the same for the leading ones, which need not be told from all the others
_FAR = 5e-4  # of the longest column: shorter ones are made orthogonal to the others once more
_BLOCKS = 8  # of columns: the lower triangle of a Gram by blocks takes 9/16 of its products
_ROWS = 128  # whose squares are summed before they are added to those of others


class Columns(NamedTuple):
    """X = M V (m, n) with nearly orthogonal columns of lengths d (n,), in no strict order; V (n, n) orthogonal."""

    X: Array
    V: Array
    d: Array


def orthogonal_columns(M: Array, floor: float) -> Columns:
    """The columns of a float32 matrix (m, n), m >= n, whose squares neither vanish nor overflow.

    Columns that are together no longer than ``floor`` times the longest get no eigenproblem of their own.
    """
    library = backend.of(M)
    xp = library.xp
    V = every(lower_gram(M)).vectors
    X = M @ V
    d = lengths(X)
    rounding = floor * float(d.max())
    short, before = len(d), len(d) + 1
    while 1 < short < before:
        before, short = short, int((d[:short] < _RESOLVED * float(d[:short].max())).sum())
        if float(xp.linalg.norm(d[:short])) <= rounding:
            break
        turn = every(lower_gram(X[:, :short])).vectors
        X[:, :short], V[:, :short] = X[:, :short] @ turn, V[:, :short] @ turn
        d[:short] = lengths(X[:, :short])
    far = d < _FAR * float(d.max())
    if bool(far.any()):  # what float32 left of long columns in a vector is much beside a short one
        near = ~far
        turn = (X[:, near].swapaxes(-1, -2) @ X[:, far]) / d[near, None] ** 2
        X[:, far] -= X[:, near] @ turn
        V[:, far], V[:, near] = V[:, far] - V[:, near] @ turn, V[:, near] + V[:, far] @ turn.swapaxes(-1, -2)
        d[far] = lengths(X[:, far])
    return Columns(X, V, d)


class Directions(NamedTuple):
    """V (n, k) with orthonormal columns, the leading right singular vectors of a matrix, and their squared singular
    values (k,), descending; left: the squared norm that they leave, up to ``slack``."""

    V: Array
    squares: Array
    left: float
    slack: float


def leading_directions(M: Array, count: int) -> Directions:
    """Of a float32 matrix (m, n) on a CPU, m >= n, that is no larger than 1 in norm.

    What a Gram resolves is taken out of the matrix, and the next directions come from a Gram of the rest. Cost of a
    level: 1/2 product of M's size and part of an eigenproblem, and 2 k / n of a product from one to the next.
    """
    library = backend.of(M)
    xp = library.xp
    rest, found, squares = M, [], []
    while True:
        values, V = leading(lower_gram(rest), count)
        top = float(values[-1])
        resolved = int((values >= _CLEAR**2 * top).sum()) if top > 0 else count
        V = V[:, count - resolved :]
        found.append(xp.flip(V, (-1,)))
        squares.append(xp.flip(values[count - resolved :], (-1,)))
        count -= resolved
        if not count:
            break
        rest = rest - (rest @ V) @ V.swapaxes(-1, -2)
    left = float(backend.squared_norm(rest)) - float(library.cast(squares[-1], xp.float64).sum())
    slack = 8 * float(xp.finfo(M.dtype).eps) * top  # a sum of eigenvalues is off by few roundings of the largest
    return Directions(xp.concatenate(found, -1), xp.concatenate(squares), left, slack)


def lower_gram(X: Array) -> Array:
    """X^T X (n, n) of X (m, n) on and below the diagonal; above it something else."""
    library = backend.of(X)
    n = X.shape[-1]
    gram = library.empty((n, n), X.dtype, X)
    step = max(1, -(-n // _BLOCKS))
    gram[...] = 0
    for start in range(0, n, step):
        rows = slice(start, start + step)
        gram[rows, : start + step] = X[:, rows].swapaxes(-1, -2) @ X[:, : start + step]
    return gram


def lengths(X: Array) -> Array:
    """The norms (n,) of the columns of X (m, n)."""
    xp = backend.of(X).xp
    sums = [(rows * rows).sum(0) for rows in (X[i : i + _ROWS] for i in range(0, X.shape[0], _ROWS))]
    return xp.sqrt(xp.stack(sums).sum(0))
