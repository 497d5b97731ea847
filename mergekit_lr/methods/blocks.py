"""Merging one matrix a block of elements at a time: no tensor is held whole, and all arithmetic stays in the cache.

Methods that say they are ``elementwise`` need of a tensor that is merged no more than the block at hand, and what a
first pass over all blocks has measured: a threshold, or the inner products of the models. Blocks are read anew in
every pass; the few operations that form a delta cost less than keeping it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeAlias

import torch
from lrgpu.random import stream
from lrgpu.sampled_selection import cuts
from lrgpu.selection import Cut
from torch import Tensor

from mergekit_lr.methods.delta import gram, widened
from mergekit_lr.methods.registry import Method

STEP = 1 << 17  # elements: the float32 blocks of some models and what is formed of them stay in the cache
_DEVICE_STEP = 1 << 24  # enough to fill a GPU
_PIECE = 1 << 10  # elements of a sample that are neighbours
_PIECES = 32  # at least
_SAMPLED = 1 << 17  # elements of which one piece is sampled


def step_on(device: torch.device) -> int:
    """Elements of a block that is merged on this device."""
    return STEP if device.type == "cpu" else _DEVICE_STEP


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

    def __len__(self) -> int:
        return -(-self.size // self.step)

    def __getitem__(self, number: int) -> Block:
        return self._block(number * self.step, min((number + 1) * self.step, self.size))

    def __iter__(self) -> Iterator[Block]:
        return (self[number] for number in range(len(self)))

    def sample(self) -> list[Tensor]:
        """Magnitudes (pieces, n) of some elements of each input, from all over the matrix, and of all its columns."""
        width = min(_PIECE, self.size)
        pieces = max(1, min(max(_PIECES, self.size // _SAMPLED), self.size // max(1, width)))
        room = self.size - width
        golden = 0.6180339887498949
        starts = [round(room * ((i + i * golden % 1) / pieces)) for i in range(pieces)]
        parts = [self._block(start, start + width).inputs for start in starts]
        return [torch.cat(column).abs_() for column in zip(*parts, strict=True)]

    def _block(self, start: int, stop: int) -> Block:
        base = _wide(self.base(start, stop)) if self.base is not None else None
        inputs = [_wide(model(start, stop)) for model in self.models]
        if self.deltas and base is not None:
            inputs = [model.sub_(base) for model in inputs]
        return Block(start, inputs, base)


@dataclass(frozen=True)
class Magnitudes(Sequence[list[Tensor]]):
    """The magnitudes of the inputs of ``blocks``, flat, formed anew whenever they are asked for."""

    blocks: Blocks

    def __len__(self) -> int:
        return len(self.blocks)

    def __getitem__(self, number: int) -> list[Tensor]:  # type: ignore[override]
        if number >= len(self):
            raise IndexError(number)
        return [model.abs_().reshape(-1) for model in self.blocks[number].inputs]


def _wide(part: Tensor) -> Tensor:
    """A part as a row (1, n) in the dtype of arithmetic, in memory of its own."""
    row = part[None]
    wide = widened(row)
    return wide.clone() if wide is row else wide


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


def sampled_cuts(blocks: Blocks, counts: Sequence[int]) -> list[Cut]:
    """For each input where its ``counts`` largest magnitudes part from the others. Measures a tensor."""
    return cuts(Magnitudes(blocks), counts, blocks.size, blocks.sample())


def products(blocks: Blocks, **_: Any) -> Tensor:
    """The inner products (T, T) of the inputs, float64; seen from the base where there is one. Measures a tensor."""
    return sum(gram(block.inputs if block.base is None else _seen_from(block)) for block in blocks)  # type: ignore[return-value]


def _seen_from(block: Block) -> list[Tensor]:
    assert block.base is not None
    return [model - block.base for model in block.inputs]
