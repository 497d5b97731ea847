"""Orthogonal columns of a matrix whose singular values differ by much, by eigenproblems in float32.

M^T M = V w V^T makes the columns of X = M V orthogonal, but a float32 Gram keeps those that are short against the
longest only roughly apart. They get an eigenproblem of their own, the shortest of them one again: each resolves what
is within 0.02 of its longest column. Then X^T X = D (I + E) D with the lengths D and a small E. Cost for (m, n): 1.6
products of M's size, an eigenproblem of n, and the same for the k short columns of each level.
"""

from __future__ import annotations

from typing import NamedTuple

from lrgpu import backend
from lrgpu.backend import Array

_RESOLVED = 0.02  # of the longest column: what an eigenproblem of a Gram in float32 tells from the others
_BLOCKS = 4  # of columns: the lower triangle of a Gram by blocks takes 5/8 of its products


class Columns(NamedTuple):
    """X = M V (m, n) with nearly orthogonal columns of lengths d (n,), in no strict order; V (n, n) orthogonal."""

    X: Array
    V: Array
    d: Array


def orthogonal_columns(M: Array) -> Columns:
    """The columns of a float32 matrix (m, n), m >= n, whose squares neither vanish nor overflow.

    Columns at the level of rounding, max(m, n) eps of the longest together, are left as they are.
    """
    library = backend.of(M)
    xp = library.xp
    _, V = xp.linalg.eigh(lower_gram(M))
    X = M @ V
    d = xp.linalg.norm(X, None, 0)
    floor = max(M.shape) * float(xp.finfo(M.dtype).eps) * float(d.max())
    short, before = len(d), len(d) + 1
    while 1 < short < before:
        before, short = short, int((d[:short] < _RESOLVED * float(d[:short].max())).sum())
        if float(xp.linalg.norm(d[:short])) <= floor:
            break
        _, turn = xp.linalg.eigh(lower_gram(X[:, :short]))
        X[:, :short], V[:, :short] = X[:, :short] @ turn, V[:, :short] @ turn
        d[:short] = xp.linalg.norm(X[:, :short], None, 0)
    return Columns(X, V, d)


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
