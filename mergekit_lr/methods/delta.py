"""What methods need of a delta, alike for a dense tensor (..., m, n) and for ``LowRank`` factors.

Linear combinations, inner products and truncated SVDs are the same mathematics for both; factors stay factors.
Arithmetic is float32, or float64 for float64 inputs; inner products are float64.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, TypeAlias

import torch
from lrgpu.backend import squared_norm as dense_squared_norm
from lrgpu.factored import SVD, stack
from lrgpu.truncated import truncated_svd
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import MismatchError

Delta: TypeAlias = Tensor | LowRank

_BLOCK = 1 << 17  # elements of all inputs together whose inner products are taken at a time


def widened(tensor: Tensor) -> Tensor:
    """The tensor in the dtype of arithmetic: float64 stays, everything else becomes float32."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()


def shape_of(deltas: Sequence[Delta]) -> tuple[int, ...]:
    """The shape that all have in common.

    Raises:
        MismatchError: they differ.
    """
    shapes = [tuple(delta.shape) for delta in deltas]
    for t, shape in enumerate(shapes):
        if shape != shapes[0]:
            raise MismatchError(f"model {t} has shape {list(shape)}, model 0 {list(shapes[0])}: they must be equal")
    return shapes[0]


def combine(coefficients: Iterable[Any], deltas: Iterable[Delta]) -> Delta:
    """sum_t c_t delta_t; a coefficient is a number or a tensor (..., 1, 1). One delta is held at a time."""
    dense: Tensor | None = None
    factors: list[tuple[Tensor, Tensor]] = []
    for c, delta in zip(coefficients, deltas, strict=True):
        if isinstance(delta, LowRank):
            folded = delta.folded()
            factors.append((_times(folded.B, c), folded.A))
        elif dense is None:
            dense = _times(widened(delta), c)
        elif isinstance(c, Tensor):
            dense = dense + _times(widened(delta), c)
        else:
            dense = dense.add_(widened(delta), alpha=c)
    if dense is None:
        B, A = stack(factors)
        return LowRank(A, B)
    for B, A in factors:
        dense += B @ A
    return dense


def scaled(delta: Delta, factor: Any) -> Delta:
    """``delta`` times a number or a tensor (..., 1, 1)."""
    if isinstance(delta, LowRank):
        folded = delta.folded()
        return LowRank(folded.A, _times(folded.B, factor))
    return delta if isinstance(factor, int | float) and factor == 1 else delta * _cast(factor, delta.dtype)


def gram(deltas: Sequence[Delta]) -> Tensor:
    """The inner products (..., T, T) of all pairs, float64.

    Of float32 tensors the products are summed in float32 within a block, pairwise, which keeps 1e-8, and the blocks in
    float64; sums that may have underflowed or overflowed are taken again in float64.
    """
    factors = [delta.folded() for delta in deltas if isinstance(delta, LowRank)]
    if len(factors) == len(deltas):
        rows = [torch.stack([left.inner(right) for right in factors], -1) for left in factors]
        return torch.stack(rows, -2)
    dense = [widened(as_dense(delta)) for delta in deltas]
    step = max(1, _BLOCK // max(1, len(dense) * dense[0].shape[-1]))
    places = range(len(dense))
    total = dense[0].new_zeros((*dense[0].shape[:-2], len(dense) * (len(dense) + 1) // 2), dtype=torch.float64)
    for start in range(0, dense[0].shape[-2], step):
        total += _inner([d[..., start : start + step, :] for d in dense])
    # The place of (s, t) among the pairs, and of (t, s).
    pairs = [[max(s, t) * (max(s, t) + 1) // 2 + min(s, t) for t in places] for s in places]
    return total[..., torch.tensor(pairs, device=total.device)]


def _inner(rows: Sequence[Tensor]) -> Tensor:
    """The inner products of all pairs s >= t of blocks (..., m, n), in that order: (..., T (T + 1) / 2), float64."""
    pairs = [(left, right) for s, left in enumerate(rows) for right in rows[: s + 1]]
    result = torch.stack([(left * right).sum((-2, -1)) for left, right in pairs], -1).double()
    squares = result[..., [s * (s + 3) // 2 for s in range(len(rows))]]
    if bool(((squares > 1e-30) & (squares < torch.inf)).all()):
        return result
    return torch.stack([(left.double() * right.double()).sum((-2, -1)) for left, right in pairs], -1)


def squared_norm(delta: Delta) -> Tensor:
    """||delta||^2 (...), float64."""
    return delta.norm() ** 2 if isinstance(delta, LowRank) else dense_squared_norm(widened(delta))


def as_dense(delta: Delta) -> Tensor:
    """The delta as one tensor."""
    return delta.dense() if isinstance(delta, LowRank) else delta


def triplets(delta: Delta, rank: int | None = None, *, tolerance: float = 1e-3) -> SVD:
    """The leading singular triplets, all of them without ``rank``; those at the level of rounding are zero.

    Null vectors are any that LAPACK happens to choose: zeroed, they can do no harm.

    Args:
        delta: dense (..., m, n), or factors, of which no dense matrix is formed.
        rank: how many; at most min(m, n).
        tolerance: by what share the error of a dense truncation may exceed the least possible.
    """
    m, n = delta.shape[-2:]
    if isinstance(delta, LowRank):
        U, S, Vh = delta.svd(rank)
        eps = torch.finfo(delta.compute_dtype).eps
    else:
        matrix = widened(delta)
        U, S, Vh = truncated_svd(matrix, min(m, n) if rank is None else rank, tolerance=tolerance)[:3]
        eps = torch.finfo(matrix.dtype).eps
    counts = (S > S[..., :1] * (max(m, n) * eps)) & (S > 0)
    return SVD(U * counts[..., None, :], S * counts, Vh * counts[..., :, None])


def from_triplets(U: Tensor, S: Tensor, Vh: Tensor, like: Delta) -> Delta:
    """U diag(S) Vh: balanced factors if ``like`` are factors, else dense."""
    root = S.clamp_min(0).sqrt()
    B, A = U * root[..., None, :], root[..., :, None] * Vh
    return LowRank(A, B) if isinstance(like, LowRank) else (U * S[..., None, :]) @ Vh


def unstacked(deltas: Sequence[Delta]) -> list[list[Delta]]:
    """Each matrix of the batch on its own: a list over the batch of lists of T deltas (m, n)."""
    flat: list[list[Delta]] = []
    for delta in deltas:
        if isinstance(delta, LowRank):
            A, B = (x.reshape(-1, *x.shape[-2:]) for x in (delta.A, delta.B))
            flat.append([LowRank(a, b, delta.scaling) for a, b in zip(A, B, strict=True)])
        else:
            flat.append(list(delta.reshape(-1, *delta.shape[-2:])))
    return [list(one) for one in zip(*flat, strict=True)]


def stacked(merged: Sequence[Delta], like: Delta) -> Delta:
    """The reverse for one delta each, in the batch shape of ``like``. Lower ranks are filled up with zeros."""
    lead = tuple(like.shape[:-2])
    factors = [delta.folded() for delta in merged if isinstance(delta, LowRank)]
    if not factors:
        dense = torch.stack([as_dense(delta) for delta in merged])
        return dense.reshape(*lead, *dense.shape[1:])
    rank = max(delta.rank for delta in factors)
    A = torch.stack([torch.nn.functional.pad(delta.A, (0, 0, 0, rank - delta.rank)) for delta in factors])
    B = torch.stack([torch.nn.functional.pad(delta.B, (0, rank - delta.rank)) for delta in factors])
    return LowRank(A.reshape(*lead, *A.shape[1:]), B.reshape(*lead, *B.shape[1:]))


def _times(tensor: Tensor, factor: Any) -> Tensor:
    return tensor * _cast(factor, tensor.dtype)


def _cast(factor: Any, dtype: torch.dtype) -> Any:
    """A tensor factor in ``dtype``, so that it does not widen what it multiplies."""
    return factor.to(dtype) if isinstance(factor, Tensor) else factor
