"""DARE (arXiv 2311.03099): drop elements of each delta at random and rescale the rest, then sum or elect.

Which elements are dropped depends on (seed, tensor, model) alone, not on order, batches, threads or workers.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Literal, NamedTuple

import numpy
import torch
from lrgpu.random import less, uniform
from torch import Tensor

from mergekit_lr.methods.blocks import Blocks
from mergekit_lr.methods.consensus import elected_sum, weighted_sum
from mergekit_lr.methods.delta import as_dense, scaled, widened
from mergekit_lr.methods.registry import Number, PerModel, Share, method
from mergekit_lr.methods.ties import l1_ratio, matched_l1

Compat = Literal["paper", "mergekit"]

_HELD = 1 << 25  # bytes of masks that are kept from one pass to the next


class Rest(NamedTuple):
    """What is left of one delta: ``factor`` multiplies it; ``mask`` has a bit for every element, where it is kept."""

    factor: float
    mask: Any = None  # a NumPy array, of which the first elements are the upper bits


def rests(
    blocks: Blocks,
    *,
    keys: Sequence[Sequence[int]],
    density: list[Any],
    rescale: bool = True,
    compat: Compat = "paper",
    **_: Any,
) -> list[Rest]:
    """What is left of each delta, with all of the matrix seen.

    For a CPU to pack and unpack bits takes a tenth of the time of drawing: masks are kept, unless they are too large.
    """
    if not rescale:
        return [Rest(1.0)] * len(density)
    if compat == "paper":
        return [Rest(inverse(share, None)) for share in density]
    before, after = ([0.0] * len(density) for _ in range(2))
    masks: list[list[Any]] = [[] for _ in density]
    held = blocks.step % 8 == 0 and len(density) * blocks.size <= 8 * _HELD
    for block in blocks:
        for t, delta in enumerate(block.inputs):
            if density[t] >= 1:
                continue
            kept = less(keys[t], density[t], delta.numel(), delta, start=block.start)
            if held and delta.device.type == "cpu":
                masks[t].append(numpy.packbits(kept.numpy()))
            before[t] += float(delta.abs_().sum())
            after[t] += float(delta.mul_(kept.to(delta.dtype)).sum())
    return [
        Rest(l1_ratio(*norms), numpy.concatenate(mask) if mask else None)
        for *norms, mask in zip(before, after, masks, strict=True)
    ]


@method(
    "dare_linear",
    paper="2311.03099",
    takes="deltas",
    spaces=("full", "core", "knots"),
    elementwise=True,
    measure=rests,
    keeps=_HELD,
)
def dare_linear(
    deltas: Sequence[Tensor],
    /,
    *,
    keys: Sequence[Sequence[int]],
    weights: PerModel = 1.0,
    density: Share = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    scale: Number = 1.0,
    compat: Compat = "paper",
    measured: list[Rest] | None = None,
    start: int = 0,
) -> Tensor:
    """Drops elements at random, rescales the rest, and takes the weighted sum.

    Formula:
        P(z_t = 1) = density
        tau_t = z_t delta_t / density
        merged = scale sum_t w_t tau_t

    Args:
        deltas: T tensors (..., m, n).
        keys: for each model the key of the random stream of each matrix of the batch.
        weights: one number for each model.
        density: the probability that an element is kept.
        normalize: divide by the sum of the weights, unless that is 0.
        rescale: divide what is kept by ``density``, so that the expected delta is unchanged.
        scale: multiplies the result.
        compat: "mergekit" rescales to the L1 norm of the delta instead.

    Use when:
        Deltas are small and redundant, as after supervised fine-tuning: most elements may go, and different
        tasks then rarely meet in one element.

    Not when:
        Deltas are large (continued pretraining): what is dropped is missed. A result must not depend on a seed:
        use ties or breadcrumbs.

    Cost:
        O(T m n), one delta in memory at a time; random numbers are counted, not stored (for compat="mergekit" a
        CPU keeps a bit for each element).

    Example:
        {density: 0.5}
    """
    dropped = _dropped(deltas, keys, density, rescale, compat, measured, start)
    return as_dense(scaled(weighted_sum(dropped, weights, normalize=normalize), scale))


@method(
    "dare_ties",
    paper="2311.03099",
    takes="deltas",
    spaces=("full", "core", "knots"),
    elementwise=True,
    measure=rests,
    keeps=_HELD,
)
def dare_ties(
    deltas: Sequence[Tensor],
    /,
    *,
    keys: Sequence[Sequence[int]],
    weights: PerModel = 1.0,
    density: Share = 1.0,
    normalize: bool = False,
    rescale: bool = True,
    scale: Number = 1.0,
    compat: Compat = "paper",
    measured: list[Rest] | None = None,
    start: int = 0,
) -> Tensor:
    """Drops elements at random, rescales the rest, and sums those of the elected sign.

    Formula:
        P(z_t = 1) = density
        tau_t = z_t delta_t / density
        s = sgn(sum_t w_t tau_t)
        merged = scale sum_(sgn(tau_t) = s) w_t tau_t

    Args:
        deltas, keys, weights, density, rescale, scale, compat: as for ``dare_linear``.
        normalize: divide by the sum of the weights of what agrees.

    Use when:
        As dare_linear, where tasks also disagree in sign.

    Not when:
        As dare_linear. The sum is not averaged by default: weights that sum to 1 keep its size.

    Cost:
        O(T m n). Large matrices are merged block by block.

    Example:
        {density: 0.5, weight: 0.5}
    """
    dropped = _dropped(deltas, keys, density, rescale, compat, measured, start)
    merged = elected_sum(dropped, weights, divisor="weights" if normalize else "none")
    return as_dense(scaled(merged, scale))


def drop(delta: Tensor, keys: Sequence[int], density: Any, start: int = 0) -> Tensor:
    """The delta (..., m, n) with each element kept with probability ``density``, unscaled.

    ``start``: the place of its first element in the matrix that the streams are for.
    """
    size = delta.shape[-2] * delta.shape[-1]
    if isinstance(density, Tensor):
        return delta * (uniform(keys, size, delta).reshape(delta.shape) < density)
    if density >= 1:
        return delta
    return _times(delta, less(keys, density, size, delta, start=start))


def _dropped(
    deltas: Iterable[Tensor],
    keys: Sequence[Sequence[int]],
    density: list[Any],
    rescale: bool,
    compat: Compat,
    measured: list[Rest] | None,
    start: int,
) -> Iterator[Tensor]:
    for t, delta in enumerate(deltas):
        delta = widened(delta)
        if measured is not None:
            yield _left(delta, measured[t], keys[t], density[t], start)
            continue
        kept = drop(delta, keys[t], density[t])
        if rescale and kept is not delta:
            kept = matched_l1(kept, delta) if compat == "mergekit" else kept * inverse(density[t], kept)
        yield kept


def _left(delta: Tensor, rest: Rest, keys: Sequence[int], density: float, start: int) -> Tensor:
    """What is left of a block (1, n), rescaled; ``start`` is its place."""
    factor, mask = rest
    if mask is None:
        kept = drop(delta, keys, density, start)
    else:
        bits = numpy.unpackbits(mask[start // 8 : (start + delta.numel() + 7) // 8], count=delta.numel())
        kept = _times(delta, torch.from_numpy(bits))
    if factor == 1:
        return kept
    return kept * factor if kept is delta else kept.mul_(factor)


def _times(delta: Tensor, mask: Tensor) -> Tensor:
    """A new tensor; numbers times numbers take half the time of numbers times integers."""
    return mask.to(delta.dtype).reshape(delta.shape).mul_(delta)


def inverse(density: Any, like: Tensor | None) -> Any:
    """1 / density; 0 where the density is 0 and nothing is kept."""
    if isinstance(density, Tensor) and like is not None:
        return (1 / density.where(density > 0, 1)).where(density > 0, 0).to(like.dtype)
    return 1 / density if density > 0 else 0.0
