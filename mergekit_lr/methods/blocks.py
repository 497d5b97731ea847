"""Merging one matrix a block of elements at a time: no tensor is held whole, and all arithmetic stays in the cache.

Methods that say they are ``elementwise`` need of a tensor that is merged no more than the block at hand, and what a
first pass over all blocks has measured: a threshold, or the inner products of the models. Blocks are read anew in
every pass; the few operations that form a delta cost less than keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple, TypeAlias

from lrgpu.random import stream
from torch import Tensor

from mergekit_lr.methods.delta import gram, widened
from mergekit_lr.methods.registry import Method

STEP = 1 << 18  # elements: a float32 block is 1 MB, and the allocator reuses its pages


class Block(NamedTuple):
    """Elements from ``start`` on: ``inputs``, weights or deltas, each (1, n) and wide; ``base`` likewise, or None."""

    start: int
    inputs: list[Tensor]
    base: Tensor | None


Read: TypeAlias = Callable[[int, int], Tensor]  # elements [start, stop) of a matrix as they are stored, flat


@dataclass(frozen=True)
class Blocks:
    """The T inputs of one matrix, read a block at a time; gone through as often as needed.

    size: elements of the matrix. models: how to read each. base: how to read the base, where there is one. deltas:
    whether the inputs are the models less the base. step: elements of a block.
    """

    size: int
    models: Sequence[Read]
    base: Read | None
    deltas: bool
    step: int = STEP

    def __iter__(self) -> Iterator[Block]:
        for start in range(0, self.size, self.step):
            base = self._part(self.base, start) if self.base is not None else None
            inputs = [self._part(model, start) for model in self.models]
            if self.deltas and base is not None:
                inputs = [model.sub_(base) for model in inputs]
            yield Block(start, inputs, base)

    def magnitudes(self, t: int) -> Magnitudes:
        """Of input ``t`` alone, flat."""
        return Magnitudes(replace(self, models=[self.models[t]]))

    def _part(self, read: Read, start: int) -> Tensor:
        part = read(start, min(start + self.step, self.size))[None]
        wide = widened(part)
        return wide.clone() if wide is part else wide


@dataclass(frozen=True)
class Magnitudes:
    """The magnitudes of the only input of ``blocks``, formed anew in every pass."""

    blocks: Blocks

    def __iter__(self) -> Iterator[Tensor]:
        return (block.inputs[0].abs_().reshape(-1) for block in self.blocks)


def merge_blocks(
    method: Method, blocks: Blocks, *, models: Sequence[str], tensor: str, seed: int = 0, **parameters: Any
) -> Iterator[tuple[Block, Tensor]]:
    """Merge one matrix; every block with its result (1, n), wide, the base added where the method gives a delta.

    Args:
        method: elementwise with these parameters.
        blocks: the inputs.
        models: a label for each model. tensor: the name of the matrix. seed: with these, what random numbers depend on.
        parameters: of the method.

    Raises:
        UsageError: a parameter that the method does not have, or a value out of range.
    """
    given: dict[str, Any] = dict(parameters)
    if method.random:
        given["keys"] = [[stream(seed, tensor, model)] for model in models]
    if method.measure is not None:
        given["measured"] = method.measure(blocks, **method.bound(given, len(models)))
    for block in blocks:
        place = {"start": block.start} if method.placed else {}
        origin = {"base": block.base} if method.base != "none" and block.base is not None else {}
        merged = method.function(block.inputs, **given, **place, **origin)
        if method.takes == "deltas" and block.base is not None:
            merged = block.base + merged
        yield block, merged


def products(blocks: Blocks, **_: Any) -> Tensor:
    """The inner products (T, T) of the inputs, float64; seen from the base where there is one. Measures a tensor."""
    return sum(gram(block.inputs if block.base is None else _seen_from(block)) for block in blocks)  # type: ignore[return-value]


def _seen_from(block: Block) -> list[Tensor]:
    assert block.base is not None
    return [model - block.base for model in block.inputs]
