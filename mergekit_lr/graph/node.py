"""A node of the tensor graph: one piece of work on a few tensors, with its costs known from headers alone."""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from typing import Any, NamedTuple


class Cost(NamedTuple):
    """What one node takes: bytes read, bytes of memory while it is computed, and floating point operations."""

    read: int
    memory: int
    flops: float


@dataclass(frozen=True)
class Node:
    """One piece of work.

    name: unique in the graph; results are kept under it. signature: what nodes share to run in one batch: operation,
    shapes, dtypes, static parameters. place: (file, offset) of its first tensor, for the order of reading. work: what
    the verb's own functions need to read and compute it.
    """

    name: str
    signature: Hashable
    place: tuple[str, int]
    cost: Cost
    work: Any = None
