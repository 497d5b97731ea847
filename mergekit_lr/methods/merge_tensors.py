"""One call for one tensor: any method, in any space, by name."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lrgpu.random import stream
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import UsageError
from mergekit_lr.methods.delta import Delta, shape_of, widened
from mergekit_lr.methods.registry import canonical, find
from mergekit_lr.methods.spaces import Space, run


def merge_tensors(
    name: str,
    inputs: Tensor | Sequence[Delta],
    /,
    *,
    base: Tensor | None = None,
    weights: Any = None,
    space: Space = "full",
    seed: int = 0,
    name_of_tensor: str | Sequence[str] = "",
    models: Sequence[str] | None = None,
    vectors: bool = False,
    **parameters: Any,
) -> Delta:
    """Merges one tensor of T models.

        merge_tensors("ties", deltas, weights=[1.0, 0.5], density=0.3)
        merge_tensors("ties", weights_of_models, base=base_weight, density=0.3)

    Args:
        name: of the method; ``methods()`` has them all.
        inputs: T tensors or ``LowRank``, or one tensor (T, ...): deltas, or with ``base``, or for a method on weights,
            weights. Of each, the last two axes are a matrix and others a batch; with fewer than two it is a vector.
        base: for methods on deltas the inputs are then weights, of which the base is subtracted first and to the
            result added; for methods on weights what the method says.
        weights: one number for each model, or one for all.
        space: "full", or for ``LowRank`` inputs "core" or "knots".
        seed, name_of_tensor, models: what random masks depend on: the seed, the tensor's name (one for each matrix of
            a batch), and a label for each model (its number without).
        vectors: the inputs (..., n) are a batch of vectors, not matrices.
        parameters: of the method.

    Returns:
        The merged tensor in the dtype of the inputs, or ``LowRank``.

    Raises:
        UsageError: an unknown method or parameter, a value out of range, a space in which it does not run.
        MismatchError: the inputs differ in shape.
    """
    method = find(name)
    parameters = canonical(parameters)
    if weights is not None:
        parameters["weights"] = weights
    given = list(inputs) if isinstance(inputs, Tensor) else inputs
    if not len(given):
        raise UsageError(f"{name}: there is nothing to merge")
    shape = shape_of(given)
    dtype = given[0].dtype if isinstance(given[0], Tensor) else None
    flat = vectors or len(shape) < 2
    tensors = [x.reshape(_as_matrix(shape)) if flat and isinstance(x, Tensor) else x for x in given]
    origin = base.reshape(_as_matrix(shape)) if flat and base is not None else base
    if origin is not None and tuple(origin.shape) != tuple(tensors[0].shape):
        raise UsageError(f"{name}: the base has shape {list(origin.shape)}, the models {list(tensors[0].shape)}")
    if method.takes == "weights":
        _check_base(method.name, method.base, origin)
        extra = {"base": origin} if method.base != "none" and origin is not None else {}
    else:
        extra = {}
        if origin is not None:
            tensors = [widened(x) - origin if isinstance(x, Tensor) else x for x in tensors]
    keys = _keys(seed, name_of_tensor, models, len(tensors), math.prod(tensors[0].shape[:-2]))
    merged = run(method, tensors, space=space, vectors=flat, keys=keys, **extra, **parameters)
    if isinstance(merged, LowRank):
        return merged
    if method.takes == "deltas" and origin is not None:
        merged = origin + merged
    merged = merged.to(dtype) if dtype is not None else merged
    return merged.reshape(shape) if flat else merged


def _keys(seed: int, names: str | Sequence[str], models: Sequence[str] | None, count: int, batch: int) -> Any:
    """For each model the keys of the streams of the batch."""
    tensors = [names] * batch if isinstance(names, str) else list(names)
    if len(tensors) != batch:
        raise UsageError(f"{len(tensors)} tensor names for a batch of {batch}")
    labels = [str(t) for t in range(count)] if models is None else models
    if len(labels) != count:
        raise UsageError(f"{len(labels)} model labels for {count} models")
    # A batch of unnamed matrices still has a stream for each.
    places = [f"{i}" if isinstance(names, str) and batch > 1 else "" for i in range(batch)]
    return [[stream(seed, t + p, model) for t, p in zip(tensors, places, strict=True)] for model in labels]


def _as_matrix(shape: tuple[int, ...]) -> tuple[int, ...]:
    return (*shape[:-1], 1, shape[-1]) if shape else (1, 1)


def _check_base(name: str, wanted: str, base: Tensor | None) -> None:
    if wanted == "required" and base is None:
        raise UsageError(f"{name} needs a base: give base=")
    if wanted == "none" and base is not None:
        raise UsageError(f"{name} has no use for a base: leave it out")
