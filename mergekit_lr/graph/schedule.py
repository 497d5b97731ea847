"""From nodes to batches: same signature together, under a memory budget, in the order of the files."""

from __future__ import annotations

from collections.abc import Container, Iterable
from dataclasses import dataclass

from mergekit_lr.errors import CapacityError
from mergekit_lr.graph.node import Cost, Node

# A batch beyond this no longer saves call overhead, and only holds memory longer.
BATCH_BYTES = 16 << 20


@dataclass(frozen=True)
class Batch:
    """Nodes of one signature that are read, computed and written together."""

    nodes: tuple[Node, ...]

    @property
    def cost(self) -> Cost:
        """The sum over its nodes."""
        return Cost(*(sum(parts) for parts in zip(*(node.cost for node in self.nodes), strict=True)))


@dataclass(frozen=True)
class Schedule:
    """Batches in the order in which they run.

    workers: batches computed at the same time. budget: bytes that batches in flight may hold. peak: bytes that they
    can hold at most.
    """

    batches: tuple[Batch, ...]
    workers: int
    budget: int
    peak: int

    @property
    def cost(self) -> Cost:
        """Bytes read and operations of all batches; ``memory`` is the peak."""
        costs = [batch.cost for batch in self.batches]
        return Cost(sum(c.read for c in costs), self.peak, sum(c.flops for c in costs))

    def without(self, done: Container[str]) -> Schedule:
        """The batches that hold a node which is not ``done``, unchanged."""
        left = tuple(b for b in self.batches if any(node.name not in done for node in b.nodes))
        return Schedule(left, self.workers, self.budget, _working_set(left, self.workers, self.budget))


def _working_set(batches: tuple[Batch, ...], workers: int, budget: int) -> int:
    """Bytes that batches in flight hold at most: every worker computes one while one more is read ahead."""
    largest = sorted((batch.cost.memory for batch in batches), reverse=True)
    return min(budget, sum(largest[: workers + 1]))


def schedule(nodes: Iterable[Node], *, budget: int, workers: int) -> Schedule:
    """Group ``nodes`` into batches and order them by place; depends on the nodes and nothing else.

    Batches do not depend on the budget or the number of workers, so neither changes a result.

    Raises:
        CapacityError: a single node needs more than ``budget`` bytes.
    """
    ordered = sorted(nodes, key=lambda node: (node.place, node.name))
    open_batches: dict[object, list[Node]] = {}
    batches: list[list[Node]] = []
    for node in ordered:
        group = open_batches.get(node.signature)
        if group is None or sum(n.cost.memory for n in group) + node.cost.memory > BATCH_BYTES:
            group = open_batches[node.signature] = []
            batches.append(group)
        group.append(node)
    made = tuple(Batch(tuple(group)) for group in batches)
    largest = max(made, key=lambda batch: batch.cost.memory, default=None)
    if largest is not None and largest.cost.memory > budget:
        raise CapacityError(
            f"{largest.nodes[0].name} needs {largest.cost.memory / 2**20:.0f} MiB while it is computed, the memory "
            f"budget leaves {budget / 2**20:.0f} MiB; raise --memory"
        )
    return Schedule(made, workers, budget, _working_set(made, workers, budget))
