"""DELLA (arXiv 2406.11617): drop elements at random, the smaller of a row the more likely, then sum or elect."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from lrgpu.random import uniform
from torch import Tensor

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.consensus import elected_sum, weighted_sum
from mergekit_lr.methods.dare import Compat
from mergekit_lr.methods.delta import widened
from mergekit_lr.methods.registry import Number, PerModel, Share, method
from mergekit_lr.methods.ties import matched_l1


@method("della_linear", paper="2406.11617", takes="deltas", spaces=("full", "core", "knots"))
def della_linear(
    deltas: Sequence[Tensor],
    /,
    *,
    keys: Sequence[Sequence[int]],
    weights: PerModel = 1.0,
    density: Share = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = False,
    rescale: bool = True,
    scale: Number = 1.0,
    compat: Compat = "paper",
) -> Tensor:
    """Drops elements at random by their rank in the row, rescales the rest, and takes the weighted sum.

    Formula:
        p_t = density - epsilon + 2 epsilon rank_t / (n - 1)
        P(z_t = 1) = p_t
        tau_t = z_t delta_t / p_t
        merged = scale sum_t w_t tau_t

    Args:
        deltas: T tensors (..., m, n); the ranks are taken in each row.
        keys: for each model the key of the random stream of each matrix of the batch.
        weights: one number for each model.
        density: the mean probability that an element is kept; 1 keeps all.
        epsilon: the smallest of a row is kept with probability density - epsilon, the largest with density +
            epsilon; both must be between 0 and 1.
        normalize: divide by the sum of the weights, unless that is 0.
        rescale: divide what is kept by its probability, so that the expected delta is unchanged.
        scale: multiplies the result.
        compat: "mergekit" rescales to the L1 norm of the delta instead.

    Use when:
        As dare_linear, where large elements should be kept more often than small ones of the same row.

    Not when:
        A density so near 0 or 1 that epsilon has no room: that is an error.

    Cost:
        O(T m n log n): each row is sorted.

    Example:
        {density: 0.5, epsilon: 0.2}
    """
    dropped = _dropped(deltas, keys, density, epsilon, rescale, compat)
    return weighted_sum(dropped, weights, normalize=normalize) * scale


@method("della", paper="2406.11617", takes="deltas", spaces=("full", "core", "knots"))
def della(
    deltas: Sequence[Tensor],
    /,
    *,
    keys: Sequence[Sequence[int]],
    weights: PerModel = 1.0,
    density: Share = 1.0,
    epsilon: PerModel = 0.15,
    normalize: bool = True,
    rescale: bool = True,
    scale: Number = 1.0,
    compat: Compat = "paper",
) -> Tensor:
    """Drops elements at random by their rank in the row, rescales, and averages those of the elected sign.

    Formula:
        p_t = density - epsilon + 2 epsilon rank_t / (n - 1)
        P(z_t = 1) = p_t
        tau_t = z_t delta_t / p_t
        s = sgn(sum_t w_t tau_t)
        merged = scale sum_(sgn(tau_t) = s) w_t tau_t / sum_(sgn(tau_t) = s) w_t

    Args:
        deltas, keys, weights, density, epsilon, rescale, scale, compat: as for ``della_linear``.
        normalize: divide by the sum of the weights of what agrees.

    Use when:
        As dare_ties, where large elements should be kept more often than small ones of the same row.

    Not when:
        A density so near 0 or 1 that epsilon has no room: that is an error.

    Cost:
        O(T m n log n): each row is sorted.

    Example:
        {density: 0.5, epsilon: 0.2}
    """
    dropped = _dropped(deltas, keys, density, epsilon, rescale, compat)
    return elected_sum(dropped, weights, divisor="weights" if normalize else "none") * scale


def probabilities(delta: Tensor, density: Any, epsilon: Any) -> Tensor:
    """With what probability each element of (..., m, n) is kept: density - epsilon up to density + epsilon."""
    columns = delta.shape[-1]
    order = torch.sort(delta.abs(), dim=-1, stable=True).indices
    places = torch.arange(columns, device=delta.device, dtype=delta.dtype).expand(delta.shape)
    ranks = torch.empty_like(delta).scatter_(-1, order, places) / max(1, columns - 1)
    return (density - epsilon) + 2 * epsilon * ranks


def _dropped(
    deltas: Iterable[Tensor],
    keys: Sequence[Sequence[int]],
    density: list[Any],
    epsilon: list[Any],
    rescale: bool,
    compat: Compat,
) -> Iterator[Tensor]:
    for t, delta in enumerate(deltas):
        delta = widened(delta)
        share = torch.as_tensor(density[t], dtype=torch.float64)
        whole = share >= 1
        if bool(whole.all()):
            yield delta
            continue
        _check(share, torch.as_tensor(epsilon[t], dtype=torch.float64), whole)
        chance = torch.where(whole.to(delta.device), 1.0, probabilities(delta, density[t], epsilon[t]))
        draw = uniform(keys[t], delta.shape[-2] * delta.shape[-1], delta).reshape(delta.shape)
        kept = delta * (draw < chance)
        if rescale:
            kept = matched_l1(kept, delta) if compat == "mergekit" else kept / chance
        yield kept.to(delta.dtype)


def _check(density: Tensor, epsilon: Tensor, whole: Tensor) -> None:
    if not bool((whole | ((density - epsilon > 0) & (density + epsilon < 1))).all()):
        raise UsageError(
            f"della: density {density.tolist()} plus and minus epsilon {epsilon.tolist()} must be between 0 and 1; "
            "choose a smaller epsilon"
        )
