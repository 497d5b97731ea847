"""A delta as low-rank factors: ``scaling * B @ A``, never formed as a dense matrix unless asked for.

Sums, products with numbers, norms, inner products, singular values and truncation all happen in the factors:
O((d_out + d_in) r^2) where the dense matrix would cost O(d_out d_in min(d_out, d_in)). Leading axes (one pair
of factors per expert) are batches throughout. The rank may be 0, and may exceed either side of the matrix.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from lrgpu.factored import SVD, balance, inner, squared_norm, stack, svd_of_product, truncate_product
from torch import Tensor

from mergekit_lr.errors import MismatchError, UsageError


class Truncation(NamedTuple):
    """The best approximation of a lower rank.

    delta: balanced factors of the kept part. residual: Frobenius norm of what was cut off, (...), float64, from the
    singular values themselves.
    """

    delta: LowRank
    residual: Tensor


@dataclass(frozen=True, eq=False)
class LowRank:
    """The delta ``scaling * B @ A`` of one weight, or of a stack of experts.

    A: (..., r, d_in); B: (..., d_out, r), any float dtype. ``scaling`` is LoRA's alpha / r (alpha / sqrt(r)
    with rsLoRA).

    Raises:
        MismatchError: A and B disagree about the rank or the leading axes.
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    def __post_init__(self):
        A, B = self.A.shape, self.B.shape
        if len(A) < 2 or len(A) != len(B) or A[-2] != B[-1] or A[:-2] != B[:-2]:
            raise MismatchError(
                f"low-rank factors do not fit together: A has shape {list(A)} and B {list(B)}, "
                "expected A (..., r, d_in) and B (..., d_out, r)"
            )

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound on the rank of the delta."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta, (..., d_out, d_in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    @property
    def compute_dtype(self) -> torch.dtype:
        """What arithmetic on the factors runs in: float32, or float64 where a factor is float64."""
        return torch.float64 if torch.float64 in (self.A.dtype, self.B.dtype) else torch.float32

    def to(self, dtype: torch.dtype | None = None, device: torch.device | str | None = None) -> LowRank:
        """The same delta with both factors in ``dtype`` and on ``device``."""
        return replace(self, A=self.A.to(device, dtype), B=self.B.to(device, dtype))

    def dense(self) -> Tensor:
        """The delta itself in float32 (float64 for float64 factors), shape (..., d_out, d_in)."""
        folded = self.folded()
        return folded.B @ folded.A

    def folded(self) -> LowRank:
        """The same delta with scaling 1: the scaling multiplied into B, in the dtype of arithmetic."""
        dtype = self.compute_dtype
        return LowRank(self.A.to(dtype), self.B.to(dtype) * self.scaling)

    def __add__(self, other: LowRank) -> LowRank:
        """The exact sum: ranks add up, nothing is lost."""
        if not isinstance(other, LowRank):
            return NotImplemented
        if self.shape != other.shape:
            raise MismatchError(f"cannot add a delta of shape {list(other.shape)} to one of shape {list(self.shape)}")
        left, right = self.folded(), other.folded()
        B, A = stack([(left.B, left.A), (right.B, right.A)])
        return LowRank(A, B)

    def __mul__(self, factor: float) -> LowRank:
        return replace(self, scaling=self.scaling * float(factor))

    __rmul__ = __mul__

    def __neg__(self) -> LowRank:
        return self * -1.0

    def __sub__(self, other: LowRank) -> LowRank:
        return self + -other

    def inner(self, other: LowRank) -> Tensor:
        """Frobenius inner product of two deltas, (...), float64."""
        return inner(self.B, self.A, other.B, other.A) * (self.scaling * other.scaling)

    def norm(self) -> Tensor:
        """Frobenius norm of the delta, (...), float64."""
        return squared_norm(self.B, self.A).clamp_min(0).sqrt() * abs(self.scaling)

    def svd(self, rank: int | None = None) -> SVD:
        """Thin SVD of the delta: U (..., d_out, k), S (..., k) descending, Vh (..., k, d_in).

        k is ``rank``, or min(r, d_out, d_in), whichever is smaller.
        """
        folded = self.folded()
        return svd_of_product(folded.B, folded.A, rank=rank)

    def truncate(self, rank: int) -> Truncation:
        """The best approximation of rank ``rank`` (Eckart-Young), balanced, and exactly what it leaves out.

        A ``rank`` beyond that of the factors changes nothing but their balance.

        Raises:
            UsageError: ``rank`` is negative.
        """
        if rank < 0:
            raise UsageError(f"a rank cannot be negative: got {rank}")
        folded = self.folded()
        B, A, residual = truncate_product(folded.B, folded.A, rank)
        return Truncation(LowRank(A, B), residual)

    def balanced(self) -> LowRank:
        """The same delta with B^T B = A A^T, diagonal: the split with the smallest factors, scaling 1."""
        folded = self.folded()
        B, A = balance(folded.B, folded.A)
        return LowRank(A, B)

    def compress(self) -> LowRank:
        """The same delta at its numerical rank, balanced: directions below rounding error are dropped.

        A direction counts from sigma_1 max(d_out, d_in) eps on, eps of the factors' own dtype being what
        they can tell apart. A stack keeps the largest rank among its matrices.
        """
        S = self.svd().S
        if S.numel() == 0:
            return self.truncate(0).delta
        floor = S[..., :1] * (max(self.shape[-2:]) * torch.finfo(self.compute_dtype).eps)
        return self.truncate(int(((S > floor) & (S > 0)).sum(-1).max())).delta
