"""Intruder dimensions: singular directions that an adapter brings into its base (arXiv 2410.21228).

Of W = W_0 + delta, a leading left singular vector u_j is an intruder if it resembles no left singular vector of W_0:
max_i |<u_j, u_0i>| < epsilon. The leading vectors come from Lanczos on x -> W_0 x + s B (A x); the maximum over all i
is bounded by the spectral measure of u_j under W_0 W_0^T. Neither W's nor W_0's SVD is formed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from lrgpu.spectral import heaviest_atom
from scipy.sparse.linalg import LinearOperator, svds
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.open import open_adapter
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.pair import layout_of, read_matrix
from mergekit_lr.errors import MismatchError
from mergekit_lr.verbs.check import check_base


@dataclass(frozen=True)
class Intruder:
    """One leading singular vector that resembles none of the base's.

    index: its place among the singular values of W. singular_value: of W. similarity: no cosine with a left singular
    vector of the base is above this; where it is above the threshold, the vector only seems to be an intruder.
    """

    module: str
    index: int
    singular_value: float
    similarity: float


def intruders(
    base: str | Path | Checkpoint,
    adapter: str | Path,
    *,
    top: int = 10,
    epsilon: float = 0.5,
    progress: Callable[[int, int, str], None] | None = None,
) -> tuple[Intruder, ...]:
    """All intruders among the ``top`` leading directions of every weight that the adapter changes.

    Args:
        base: the model. adapter: a folder, a file or a Hub id.
        top: how many leading singular vectors of W are looked at. epsilon: the threshold of similarity.
        progress: called with (modules done, modules in all, name).

    Raises:
        MismatchError: the adapter changes a weight that the base does not have, or of another shape.
    """
    checkpoint = Checkpoint.open(base)
    layout = layout_of(checkpoint)
    if problems := check_base(adapter, checkpoint):
        raise MismatchError(f"{adapter} does not fit {checkpoint.ref}: {problems[0]}")
    weights = open_adapter(adapter, layout=layout).adapter.weights
    found: list[Intruder] = []
    for done, (name, weight) in enumerate(weights.items()):
        if progress:
            progress(done, len(weights), name)
        parameter = layout.by_name[name]
        deltas = [weight.delta] if parameter.matrices == 1 else _experts(weight.delta)
        for index, delta in enumerate(deltas):
            matrix = read_matrix(checkpoint, parameter, index).float()
            matrix = matrix.mT if parameter.kind.turned else matrix.reshape(matrix.shape[0], -1)
            label = name if len(deltas) == 1 else f"{name}[{index}]"
            found.extend(_of_matrix(label, matrix, delta.folded(), top, epsilon))
    if progress:
        progress(len(weights), len(weights), "")
    return tuple(found)


def _experts(delta: LowRank) -> list[LowRank]:
    return [LowRank(a, b, delta.scaling) for a, b in zip(delta.A, delta.B, strict=True)]


def _of_matrix(name: str, base: Tensor, delta: LowRank, top: int, epsilon: float) -> Iterator[Intruder]:
    a, b = delta.A.float(), delta.B.float()
    if delta.rank == 0 or not float(delta.norm()):
        return
    u, s = _leading(base, a, b, min(top, min(base.shape)))
    atoms = heaviest_atom(lambda x: base @ (base.mT @ x), u, threshold=epsilon**2)
    for index in range(len(s)):
        if float(atoms.mass[index]) < epsilon**2:
            yield Intruder(name, index, float(s[index]), float(atoms.bound[index].sqrt()))


def _leading(base: Tensor, a: Tensor, b: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Left vectors (m, count) and singular values, descending, of base + b @ a."""
    if count >= min(base.shape) - 1:  # Lanczos needs room
        u, s, _ = torch.linalg.svd(base + b @ a, full_matrices=False)
        return u[:, :count], s[:count]
    start = np.ones(min(base.shape), dtype=np.float32)
    u, s, _ = svds(_Adapted(base, a, b), k=count, v0=start)
    order = np.argsort(-np.asarray(s))
    return torch.from_numpy(np.asarray(u)[:, order].copy()), torch.from_numpy(np.asarray(s)[order].copy())


class _Adapted(LinearOperator):
    """base + b @ a as what Lanczos asks of a matrix: its products, on either side."""

    def __init__(self, base: Tensor, a: Tensor, b: Tensor):
        super().__init__(np.float32, tuple(base.shape))
        self.base, self.a, self.b = base, a, b

    def _matmat(self, X: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
        return (self.base @ x + self.b @ (self.a @ x)).numpy()

    def _rmatmat(self, X: np.ndarray) -> np.ndarray:
        x = torch.from_numpy(np.ascontiguousarray(X, dtype=np.float32))
        return (self.base.mT @ x + self.a.mT @ (self.b.mT @ x)).numpy()
