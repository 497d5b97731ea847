"""What the tests of floor 1 share: matrices with known spectra, and the way back to float64 on the CPU."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def double(array: Any) -> Tensor:
    """A torch or CuPy array as a float64 tensor on the CPU."""
    tensor = array if isinstance(array, torch.Tensor) else torch.from_numpy(array.get())
    return tensor.detach().cpu().double()


def dense(result: Any) -> Tensor:
    """U diag(S) Vh of a result, float64 on the CPU."""
    return (double(result.U) * double(result.S)[..., None, :]) @ double(result.Vh)


def normal(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def with_spectrum(values: Tensor, rows: int, columns: int, seed: int = 0) -> Tensor:
    """A float32 matrix (rows, columns) with these singular values and random singular vectors."""
    U, _ = torch.linalg.qr(normal(rows, len(values), seed=seed, dtype=torch.float64))
    V, _ = torch.linalg.qr(normal(columns, len(values), seed=seed + 1, dtype=torch.float64))
    return ((U * values.double()) @ V.T).float()


def low_rank_and_noise(rows: int, columns: int, rank: int, noise: float, seed: int = 0) -> Tensor:
    """A random matrix of this rank and unit norm, and Gaussian noise of norm ``noise``."""
    D = normal(rows, rank, seed=seed) @ normal(rank, columns, seed=seed + 1)
    return D / D.norm() + noise * normal(rows, columns, seed=seed + 2) / (rows * columns) ** 0.5


def merged_in_bf16(rows: int, columns: int, rank: int, seed: int = 0) -> Tensor:
    """The delta of a LoRA of 1 % of the weights' norm, merged into bfloat16 weights: it ends in rounding."""
    W = (0.02 * normal(rows, columns, seed=seed)).bfloat16().float()
    D = normal(rows, rank, seed=seed + 1) @ normal(rank, columns, seed=seed + 2)
    return (W + 0.01 * W.norm() / D.norm() * D).bfloat16().float() - W
