"""A delta as low-rank factors: ``scaling * B @ A``, never formed as a dense matrix unless asked for."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class LowRank:
    """The delta ``scaling * B @ A`` of one weight, or of a stack of experts.

    A: (..., r, d_in); B: (..., d_out, r), any float dtype. ``scaling`` is LoRA's alpha / r (alpha / sqrt(r)
    with rsLoRA).
    """

    A: Tensor
    B: Tensor
    scaling: float = 1.0

    @property
    def rank(self) -> int:
        """Number of columns of B: an upper bound on the rank of the delta."""
        return self.A.shape[-2]

    @property
    def shape(self) -> tuple[int, ...]:
        """Shape of the delta, (..., d_out, d_in)."""
        return (*self.B.shape[:-1], self.A.shape[-1])

    def dense(self) -> Tensor:
        """The delta itself in float32 (float64 for float64 factors), shape (..., d_out, d_in)."""
        dtype = torch.promote_types(torch.promote_types(self.A.dtype, self.B.dtype), torch.float32)
        return (self.B.to(dtype) * self.scaling) @ self.A.to(dtype)
