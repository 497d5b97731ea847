"""The Karcher mean: the point of the sphere with the least sum of squared angles to the models' directions.

Found by gradient steps: average the logarithms of the directions at the present point, follow the exponential map.
Every point on the way is a linear combination of the inputs, so the iteration runs on T coefficients and the T x T
Gram matrix: the tensors are read once for that and once for the result, and factors stay factors.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from mergekit_lr.methods.blocks import products
from mergekit_lr.methods.delta import Delta, combine, gram
from mergekit_lr.methods.registry import method


@method(
    "karcher",
    paper="10.1002/cpa.3160300502",
    takes="weights",
    factored=True,
    elementwise=True,
    measure=products,
)
def karcher(
    models: Sequence[Delta], /, *, max_iter: int = 10, tol: float = 1e-5, measured: Tensor | None = None
) -> Delta:
    """The Riemannian mean of the models' directions, at the mean of their lengths.

    Formula:
        u = argmin_v sum_t angle(v, W_t)^2
        merged = u / ||u|| * mean_t ||W_t||

    Args:
        models: T tensors (..., m, n), or T ``LowRank``; all count alike. A zero tensor has no direction but counts
            in the mean length.
        max_iter: gradient steps at most.
        tol: angle below which a model counts as reached, and step below which the iteration ends.

    Use when:
        Several models count alike and none of them should be a reference point.

    Not when:
        Models need weights (multislerp), or are fine-tunes of one base with small deltas, where linear gives
        nearly the same.

    Cost:
        O(T^2 m n) for the inner products once; the iteration is on T numbers. Adapters stay factors.

    Example:
        {max_iter: 20}
    """
    inner = gram(models) if measured is None else measured
    flat = inner.reshape(-1, *inner.shape[-2:])
    coefficients = torch.stack([_mean(one, max_iter, tol) for one in flat]).reshape(inner.shape[:-1])
    return combine([c[..., None, None] for c in coefficients.unbind(-1)], models)


def _mean(products: Tensor, max_iter: int, tol: float) -> Tensor:
    """The T coefficients of the mean, from the inner products (T, T) of the models."""
    lengths = products.diagonal().sqrt()
    valid = lengths > tol
    if not bool(valid.any()):
        return torch.zeros_like(lengths)
    inverse = torch.where(valid, 1 / lengths.where(valid, 1.0), 0.0)
    G = products * inverse[:, None] * inverse[None, :]  # of unit vectors; those of zero tensors are zero
    share = valid.double() / valid.sum()
    c = share / _length(G, share) if _length(G, share) >= tol else _first(valid)
    for _ in range(max_iter):
        cosines = (G @ c).clamp(-1, 1)
        angles = cosines.acos()
        pull = torch.where(valid & (angles >= tol), share * angles / angles.sin().where(angles >= tol, 1.0), 0.0)
        step = pull - (pull * cosines).sum() * c
        size = _length(G, step)
        if size < tol:
            break
        c = size.cos() * c + size.sin() / size * step
        c = c / _length(G, c)
    return c * inverse * lengths.mean()


def _length(G: Tensor, c: Tensor) -> Tensor:
    return (c @ G @ c).clamp_min(0).sqrt()


def _first(valid: Tensor) -> Tensor:
    """Where to start when the directions cancel: at the first one."""
    start = torch.zeros(valid.shape, dtype=torch.float64, device=valid.device)
    start[int(valid.int().argmax())] = 1
    return start
