"""EigenLoRAx (arXiv 2502.04700): one basis for a collection of adapters, and each adapter as its coefficients.

Per module and side: with F (d, R) the columns of all B_t, or of all A_t^T, side by side, the basis C (d, K) are the
leading left singular vectors of F, and an adapter is kept as C^T F_t (K, r). What adapters share is stored once.
Cost O(d R^2).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError


class Basis(NamedTuple):
    """A (..., n, K_A), B (..., m, K_B), orthonormal columns. A_variance, B_variance: their squared singular values."""

    A: Tensor
    B: Tensor
    A_variance: Tensor
    B_variance: Tensor


class Coefficients(NamedTuple):
    """A (..., K_A, r), B (..., K_B, r): the factors in the basis, A^T = basis.A @ A and B = basis.B @ B."""

    A: Tensor
    B: Tensor


def shared_basis(factors: Sequence[LowRank], components: int, *, center: bool = False) -> Basis:
    """The basis in which the adapters' factors are best represented together.

    Args:
        factors: T ``LowRank`` of one module, of any ranks; scalings are folded into B.
        components: K; at most as many as there are columns or rows.
        center: subtract the mean column first, as the published code does without adding it back. Off, the
            reconstruction error is the least possible.

    Raises:
        UsageError: ``components`` is less than 1.
    """
    if components < 1:
        raise UsageError(f"a shared basis needs 1 component or more, got {components}")
    folded = [factor.folded() for factor in factors]
    A, A_variance = _leading(torch.cat([f.A for f in folded], -2).mT, components, center)
    B, B_variance = _leading(torch.cat([f.B for f in folded], -1), components, center)
    return Basis(A, B, A_variance, B_variance)


def coefficients(factor: LowRank, basis: Basis) -> Coefficients:
    """The projection of one adapter's factors onto the basis; it need not be one of those that made it."""
    folded = factor.folded()
    return Coefficients(basis.A.mT @ folded.A.mT, basis.B.mT @ folded.B)


def reconstruct(kept: Coefficients, basis: Basis) -> LowRank:
    """The adapter that the coefficients stand for."""
    return LowRank((basis.A @ kept.A).mT, basis.B @ kept.B)


def _leading(columns: Tensor, components: int, center: bool) -> tuple[Tensor, Tensor]:
    """(the leading left singular vectors (..., d, K), their squared singular values (..., K)) of (..., d, R)."""
    F = columns.double()
    if center:
        F = F - F.mean(-1, keepdim=True)
    U, S, _ = torch.linalg.svd(F, full_matrices=False)
    return U[..., :components].to(columns.dtype), (S * S)[..., :components].to(columns.dtype)
