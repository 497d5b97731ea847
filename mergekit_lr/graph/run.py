"""Running a schedule: a reader, some workers and a writer, overlapped, never over the memory budget.

Each worker computes with one thread of the linear algebra library: two modules side by side on two cores beat one
module on both, and a result does not depend on how many workers there are.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch

from mergekit_lr.graph.resources import keep_freed_memory
from mergekit_lr.graph.schedule import Batch, Schedule


class Progress(NamedTuple):
    """How far a run has come: bytes of input done and in all, and the last name finished."""

    done: int
    total: int
    name: str


def run(
    plan: Schedule,
    *,
    read: Callable[[Batch], Any],
    compute: Callable[[Batch, Any], Any],
    write: Callable[[Batch, Any], None],
    progress: Callable[[Progress], None] | None = None,
) -> None:
    """Read, compute and write every batch of ``plan``; ``write`` is called from this thread only, in plan order.

    The first error stops the run: batches under way are finished, no other is begun, and the error is raised.
    """
    keep_freed_memory()
    total, done = plan.cost.read, 0
    if progress:
        progress(Progress(0, total, ""))
    memory = _Budget(plan.budget)
    stop = threading.Event()

    def work(batch: Batch, inputs: Future[Any]) -> Any:
        held = inputs.result()
        return compute(batch, held)

    def read_unless_stopped(batch: Batch) -> Any:
        if stop.is_set():
            raise _Stopped
        return read(batch)

    with (
        _one_thread_each(),
        ThreadPoolExecutor(1, "read") as reader,
        ThreadPoolExecutor(plan.workers, "compute") as pool,
    ):
        waiting: list[tuple[Batch, Future[Any]]] = []

        def finish_first() -> None:
            nonlocal done
            batch, future = waiting.pop(0)
            write(batch, future.result())
            del future
            memory.release(batch.cost.memory)
            done += batch.cost.read
            if progress:
                progress(Progress(done, total, batch.nodes[-1].name))

        try:
            for batch in plan.batches:
                while waiting and (len(waiting) > plan.workers or not memory.fits(batch.cost.memory)):
                    finish_first()
                memory.take(batch.cost.memory)
                inputs = reader.submit(read_unless_stopped, batch)
                waiting.append((batch, pool.submit(work, batch, inputs)))
                del inputs
            while waiting:
                finish_first()
        except BaseException:
            stop.set()
            for _, future in waiting:
                future.cancel()
            raise


class _Stopped(Exception):
    """Raised in a stage when another stage failed; never leaves this module."""


class _Budget:
    """Bytes in flight; used from one thread."""

    def __init__(self, total: int):
        self._free = total

    def fits(self, nbytes: int) -> bool:
        return nbytes <= self._free

    def take(self, nbytes: int) -> None:
        self._free -= nbytes

    def release(self, nbytes: int) -> None:
        self._free += nbytes


@contextmanager
def _one_thread_each() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(before)
