"""The published formulas of spectral merging as their authors' code runs them: dense deltas and dense SVDs.

Each takes T deltas (m, n) in one dtype and gives the merged one (m, n). What the peers add around them (state dicts,
lists of layers, conversions) is left out; the SVDs, their dtype where the code names one, and the products are theirs.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Rule = Callable[[Sequence[Tensor]], Tensor]


def iso_c(deltas: Sequence[Tensor]) -> Tensor:
    """arXiv 2502.04959: one SVD of the sum."""
    U, S, Vh = torch.linalg.svd(total(deltas), full_matrices=False)
    return torch.linalg.multi_dot((U, torch.diag(torch.full_like(S, float(S.mean()))), Vh))


def iso_cts(deltas: Sequence[Tensor], common_fraction: float = 0.8) -> Tensor:
    """arXiv 2502.04959: an SVD of the sum, one of each task's rest, two to make the bases orthogonal."""
    U, S, Vh = torch.linalg.svd(total(deltas), full_matrices=False)
    p, T = len(S), len(deltas)
    own = round((p - int(p * common_fraction)) / T)
    common = p - own * T
    lefts, values, rights = [U[:, :common]], [S[:common]], [Vh[:common]]
    for delta in deltas:
        rest = delta - U[:, :common] @ (U[:, :common].T @ delta)
        u, s, vh = torch.linalg.svd(rest, full_matrices=False)
        lefts.append(u[:, :own])
        values.append(s[:own])
        rights.append(vh[:own])
    left, right = procrustes(torch.cat(lefts, 1)), procrustes(torch.cat(rights, 0))
    return torch.cat(values).mean() * (left @ right)


def tsv_m(deltas: Sequence[Tensor]) -> Tensor:
    """arXiv 2412.00081: an SVD of each task, of which 1 / T is kept, and two to make the vectors orthogonal."""
    k = min(deltas[0].shape) // len(deltas)
    U, S, V = [], [], []
    for delta in deltas:
        u, s, vh = torch.linalg.svd(delta, full_matrices=False)
        U.append(u[:, :k])
        S.append(s[:k])
        V.append(vh[:k])
    left, right = procrustes(torch.cat(U, 1)), procrustes(torch.cat(V, 0))
    return torch.linalg.multi_dot((left, torch.diag(torch.cat(S)), right))


def knots(deltas: Sequence[Tensor], rule: Rule) -> Tensor:
    """arXiv 2410.19735: a float64 SVD of all deltas side by side; the rule merges their right blocks."""
    U, S, Vh = torch.linalg.svd(torch.cat(list(deltas), 1).double(), full_matrices=False)
    kept = S > 1e-5
    U, S, Vh = (x.to(deltas[0].dtype) for x in (U[:, kept], S[kept], Vh[kept]))
    return U @ rule([S[:, None] * block for block in Vh.split(deltas[0].shape[1], 1)])


def core_space(B: Sequence[Tensor], A: Sequence[Tensor], rule: Rule) -> Tensor:
    """arXiv 2509.17786: float64 SVDs of the stacked factors; the rule merges the small cores."""
    dtype = B[0].dtype
    U = torch.linalg.svd(torch.cat(list(B), 1).double(), full_matrices=False).U.to(dtype)
    V = torch.linalg.svd(torch.cat(list(A), 0).double(), full_matrices=False).Vh.to(dtype)
    return U @ rule([(U.T @ b) @ (a @ V.T) for b, a in zip(B, A, strict=True)]) @ V


def ties(deltas: Sequence[Tensor], density: float = 0.2) -> Tensor:
    """arXiv 2306.01708 by sorting: trim each, elect signs by the sum, average what agrees."""
    stack = torch.stack([delta.flatten() for delta in deltas])
    kept = int(density * stack.shape[1])
    least = stack.abs().sort(dim=1, descending=True).values[:, kept - 1 : kept]
    stack = stack * (stack.abs() >= least)
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    merged = (stack * agrees).sum(0) / agrees.sum(0).clamp_min(1)
    return merged.view(deltas[0].shape)


def total(deltas: Sequence[Tensor]) -> Tensor:
    """The sum."""
    return torch.stack(list(deltas)).sum(0)


def procrustes(X: Tensor) -> Tensor:
    """The nearest matrix with orthonormal columns or rows, by an SVD."""
    U, _, Vh = torch.linalg.svd(X, full_matrices=False)
    return U @ Vh
