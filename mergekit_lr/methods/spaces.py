"""Where a method on deltas runs: on the deltas themselves, or on small coordinates of adapters.

full: the deltas. Adapters stay factors with methods that can (linear ones, svd, iso_c, tsv_m ...), otherwise
    they are multiplied out.
core: Core Space (arXiv 2509.17786). With U_B, V_A orthonormal bases of [B_1 | ... | B_T] and [A_1; ...; A_T], the
    method sees M_t = (U_B^T B_t)(A_t V_A), and the result is U_B M V_A^T. Lossless: U_B M_t V_A^T = delta_t.
knots: KnOTS (arXiv 2410.19735). With [delta_1 | ... | delta_T] = U S [V_1^T | ... | V_T^T], the method sees
    S V_t^T (K, n), and the result is U M.

Both take O((m + n) R^2 + R^3) for a total rank R, never form an m x n matrix and give factors. A linear rule needs no
coordinates: its result is the same in every space, and the factors side by side are that result.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, NamedTuple, TypeAlias

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, as_dense, shape_of, stacked, unstacked
from mergekit_lr.methods.registry import Method

Space: TypeAlias = Literal["full", "core", "knots"]
Rule: TypeAlias = Callable[[Sequence[Tensor]], Any]  # a method on T tensors, with its parameters


class CoreBasis(NamedTuple):
    """U (m, K_B), V (n, K_A), orthonormal; coordinates M_t (K_B, K_A) of each delta: delta_t = U M_t V^T."""

    U: Tensor
    V: Tensor
    coordinates: list[Tensor]


class KnotsBasis(NamedTuple):
    """U (m, K) orthonormal, S (K,) descending, V[t] (K, n): delta_t = U diag(S) V[t]."""

    U: Tensor
    S: Tensor
    V: list[Tensor]


class Multiplied(Sequence[Tensor]):
    """The deltas as dense tensors, each multiplied out when it is asked for."""

    def __init__(self, deltas: Sequence[Delta]):
        self.deltas = deltas

    def __len__(self) -> int:
        return len(self.deltas)

    def __getitem__(self, index: Any) -> Any:
        picked = self.deltas[index]
        return Multiplied(picked) if isinstance(index, slice) else as_dense(picked)


def run(
    method: Method,
    inputs: Sequence[Delta],
    *,
    space: Space = "full",
    vectors: bool = False,
    knots_scale: Literal["sigma", "none"] = "sigma",
    keys: Sequence[Sequence[int]] = (),
    **parameters: Any,
) -> Delta:
    """Runs a method in a space.

    Args:
        method: what to run.
        inputs: T weights or deltas (..., m, n), dense or ``LowRank``; in the spaces "core" and "knots" all ``LowRank``.
            In the space "full" the sequence may make them when they are asked for.
        space: where.
        vectors: the inputs (..., 1, n) are vectors, for which a method may have another rule; in any space alike.
        knots_scale: in the space "knots", "sigma" shows the method S V_t^T as the reference does, "none" V_t^T alone.
        keys: streams of random numbers, for methods that draw: for each model one per matrix of the batch.
        parameters: of the method; one number per matrix of a batch is for the space "full" only.

    Raises:
        UsageError: the method does not run there, or takes other inputs.
        MismatchError: adapters differ in shape.
    """
    random: dict[str, Any] = {"keys": keys} if method.random else {}
    if vectors and method.vectors is not None:
        return method.vectors(inputs, **method.bound(parameters, len(inputs)))
    if not vectors and space not in method.spaces:
        raise UsageError(f"{method.name} does not run in the space {space!r}; choose one of {', '.join(method.spaces)}")
    if method.takes != "factors" and (vectors or space == "full"):
        return method.function(inputs if method.factored else Multiplied(inputs), **random, **parameters)
    factors = [delta for delta in inputs if isinstance(delta, LowRank)]
    if len(factors) < len(inputs):
        what = method.name if method.takes == "factors" else f"the space {space!r}"
        raise UsageError(f"{what} takes adapters (low-rank factors), got dense tensors")
    lead = shape_of(factors)[:-2]
    if method.takes == "factors" or method.basis == "none":
        return method.function(factors, **random, **parameters)
    if lead:  # ranks, and so the sizes of the coordinates, differ within a batch
        streams = zip(*keys, strict=True) if random else [()] * len(unstacked(factors[:1]))
        merged = [
            run(method, one, space=space, knots_scale=knots_scale, keys=[[key] for key in own], **parameters)
            for one, own in zip(unstacked(factors), streams, strict=True)
        ]
        return stacked(merged, factors[0])

    def rule(coordinates: Sequence[Tensor]) -> Any:
        return method.function(coordinates, **random, **parameters)

    if space == "core":
        return in_core(factors, rule, singular=method.basis == "own")
    return in_knots(factors, rule, scale=knots_scale)


def in_core(factors: Sequence[LowRank], rule: Rule, *, singular: bool = True) -> LowRank:
    """The rule's result on the coordinates in Core Space, as factors; ``singular``: as :func:`core_basis`."""
    basis = core_basis(factors, singular=singular)
    return lifted(as_dense(rule(basis.coordinates)), basis)


def lifted(merged: Tensor, basis: CoreBasis) -> LowRank:
    """U M V^T as factors of the smaller of M's sides."""
    if merged.shape[-2] < merged.shape[-1]:
        return LowRank(merged @ basis.V.mT, basis.U)
    return LowRank(basis.V.mT, basis.U @ merged)


def core_basis(factors: Sequence[LowRank], *, singular: bool = True) -> CoreBasis:
    """The singular bases of the stacked factors, and the coordinates of each delta (m, n) in them.

    The bases are those of the unweighted factors, scalings folded into B. Methods that are not equivariant (TIES,
    DARE) depend on this choice. Dependent directions are dropped. Signs are such that the largest element of each
    vector is positive.

    Args:
        factors: T ``LowRank``.
        singular: False takes other orthonormal bases of the same spaces where they come cheaper.
    """
    folded = [factor.folded() for factor in factors]
    ranks = [f.A.shape[-2] for f in folded]
    U, of_B = _column_basis(torch.cat([f.B for f in folded], -1), singular)
    V, of_A = _column_basis(torch.cat([f.A for f in folded], -2).mT, singular)
    blocks = zip(of_B.split(ranks, -1), of_A.split(ranks, -1), strict=True)
    return CoreBasis(U, V, [B @ A.mT for B, A in blocks])


def in_knots(factors: Sequence[LowRank], rule: Rule, *, scale: Literal["sigma", "none"] = "sigma") -> LowRank:
    """The rule's result on the right blocks of the joint SVD, as factors."""
    basis = knots_basis(factors)
    if scale == "sigma":
        return LowRank(as_dense(rule([basis.S[:, None] * V for V in basis.V])), basis.U)
    return LowRank(basis.S[:, None] * as_dense(rule(basis.V)), basis.U)


def knots_basis(factors: Sequence[LowRank], *, floor: float | None = None) -> KnotsBasis:
    """The SVD of the deltas (m, n) side by side, from small cores alone.

    Args:
        factors: T ``LowRank``.
        floor: drop singular values up to this; without it those at the level of rounding.
    """
    folded = [factor.folded() for factor in factors]
    dtype = torch.promote_types(*(folded[i].compute_dtype for i in (0, -1)))
    B = torch.cat([f.B for f in folded], -1)
    left, right = _orthonormal(B), [_orthonormal(f.A.mT) for f in folded]
    U, S, Vh = torch.linalg.svd(left.R @ torch.block_diag(*(side.R.mT for side in right)), full_matrices=False)
    sides = B.shape[-2], sum(f.A.shape[-1] for f in folded)
    least = S[:1] * (max(sides) * torch.finfo(dtype).eps) if floor is None else floor
    kept = int((S > least).sum())
    blocks = Vh[:kept].split([side.R.shape[-2] for side in right], -1)
    V = [side.times(block.mT).mT.to(dtype) for block, side in zip(blocks, right, strict=True)]
    return KnotsBasis(left.times(U[:, :kept]).to(dtype), S[:kept].to(dtype), V)


class _Orthonormal(NamedTuple):
    """Columns X (d, R) = Q @ R with Q orthonormal, R (., R) in float64: Q itself, or X and R where R has an inverse."""

    X: Tensor
    R: Tensor
    inverted: bool

    def times(self, M: Tensor) -> Tensor:
        """Q @ M for M in float64."""
        if not self.inverted:
            return self.X @ M
        return self.X @ torch.linalg.solve_triangular(self.R, M, upper=True).to(self.X.dtype)


def _orthonormal(columns: Tensor) -> _Orthonormal:
    """Q and R of the columns (d, R), by a Cholesky of their Gram in float64 where they are far from dependent.

    That is three times faster than Householder's QR, which does the rest and all float64 columns. The test is on
    columns of length 1: their Gram's Cholesky has the distance of each column from those before it on its diagonal.
    Below 0.1 the product of Q is taken in float64, below 0.001 QR has to do it.
    """
    if columns.dtype != torch.float64 and columns.shape[-2] >= columns.shape[-1] > 0:
        wide = columns.double()
        gram = wide.mT @ wide
        lengths = gram.diagonal().sqrt()
        R, failed = torch.linalg.cholesky_ex(gram / lengths / lengths[:, None], upper=True)
        distance = float(R.diagonal().min())
        if not int(failed) and distance > 1e-3:
            return _Orthonormal(columns if distance > 0.1 else wide, R * lengths, True)
    Q, R = torch.linalg.qr(columns.double())
    return _Orthonormal(Q, R, False)


def _column_basis(stack: Tensor, singular: bool) -> tuple[Tensor, Tensor]:
    """U (d, K), the left singular vectors of the stack (d, R) that are above rounding, by QR and a small SVD, and the
    coordinates U^T stack (K, R); Q and R of the QR itself where any basis will do and no column depends on others."""
    found = _orthonormal(stack)
    if found.inverted and not singular:
        Q = found.times(torch.eye(stack.shape[-1], dtype=torch.float64, device=stack.device))
        return Q.to(stack.dtype), found.R.to(stack.dtype)
    U, S, _ = torch.linalg.svd(found.R, full_matrices=False)
    kept = (S > S[:1] * (max(stack.shape) * torch.finfo(stack.dtype).eps)) & (S > 0)
    basis, coordinates = found.times(U[:, kept]), U[:, kept].mT @ found.R  # zero where the stack is
    if basis.shape[-1]:
        sign = basis.gather(0, basis.abs().argmax(0, keepdim=True)).sign().to(coordinates.dtype)
        basis, coordinates = basis * sign, coordinates * sign.mT
    return basis.to(stack.dtype), coordinates.to(stack.dtype)
