"""Apply adapters to a base: one or several are baked into its weights, W + sum_i w_i s_i B_i A_i, or taken out.

Headers first: what happens to every tensor is decided before one is read (``plan_apply``). Then pieces of a few MiB
stream through read, compute and write, straight to their places in the output's shards; a model is never in memory.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.folder import OutputFolder
from mergekit_lr.checkpoint.shards import MemoryOutput, Output, ShardedOutput
from mergekit_lr.errors import CapacityError
from mergekit_lr.graph.journal import Journal, fingerprint
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.report.application import ApplyReport
from mergekit_lr.report.manifest import state, state_of_files
from mergekit_lr.verbs.apply.adapters import Reference
from mergekit_lr.verbs.apply.compute import Application
from mergekit_lr.verbs.apply.plan import ApplyPlan, plan_apply
from mergekit_lr.verbs.apply.result import report_of, write_beside


def apply(
    base: str | Path | Checkpoint | Mapping[str, Tensor],
    adapters: Iterable[Reference | tuple[Reference, float]],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> ApplyReport:
    """Bake adapters into a base and write the whole model.

    Args:
        base: the model: a folder, a file, a Hub id ``org/name@revision``, a dict of tensors.
        adapters: each a folder, a file of any dialect, a Hub id or an ``Adapter``, alone or with its weight:
            ``[("math-lora", 0.7), "code-lora"]``. What an adapter replaces or rescales (saved modules, DoRA) counts
            with its weight as the difference that it makes.
        out: folder of the result; None keeps the tensors in memory (``report.tensors``).
        overwrite: replace an earlier result at ``out``. resume: continue a run that was cut off.
        progress: called with (bytes done, bytes in all, name) as batches finish.
        unmerge: take the adapters out again, W - sum_i w_i s_i B_i A_i.
        rounding: ``"nearest"``, or ``"stochastic"``: unbiased, for changes that the dtype would swallow.
        dtype: of all floating tensors; by default each keeps its own. shard_size: cut the files anew, ``"5GB"``; by
            default they are those of the base. memory, device, threads: see ``resources``. seed: of stochastic
            rounding.

    Returns:
        What was changed by how much, and what rounding lost of it; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: bad input or a failed run; nothing is left at ``out``.
    """
    started = time.perf_counter()
    plan = plan_apply(base, adapters, **options)
    plan.base.fetch()
    if out is None:
        with tempfile.TemporaryDirectory(prefix="lrmerge-") as scratch:
            journal = Journal(Path(scratch), "")
            copied = {name: plan.base.read(name) for name, state in plan.states.items() if state == "copied"}
            memory = MemoryOutput(plan.outputs, copied)
            compute(plan, memory, journal, progress, skip=_copies(plan, copied))
            return replace(report_of(plan, journal, None, started), tensors=memory.tensors)
    inputs = [plan.base.folder] if plan.base.folder else []
    inputs += [file.parent for given in plan.given for file in given.files]
    with OutputFolder(out, overwrite=overwrite, resume=resume, inputs=inputs) as folder:
        _check_space(plan, folder.partial)
        journal = Journal(folder.partial, _fingerprint(plan), resume=resume)
        shards = ShardedOutput(folder.partial, plan.files, metadata=plan.base.metadata, resume=journal.resumed > 0)
        compute(plan, shards, journal, progress)
        shards.finish(index=plan.index)
        report = write_beside(plan, report_of(plan, journal, str(out), started), folder.partial, started)
        journal.close()
    return report


def compute(
    plan: ApplyPlan,
    output: Output,
    journal: Journal,
    progress: Callable[[Progress], None] | None = None,
    *,
    skip: Container[str] = (),
) -> None:
    """Run every batch with a node that is neither in the journal nor to be skipped."""
    work = Application.of(plan, output, journal)
    left = plan.schedule.without(journal).without(skip)
    run(left, read=work.read, compute=work.compute, write=work.write, progress=progress)


def _copies(plan: ApplyPlan, names: Container[str]) -> set[str]:
    """The nodes that would copy the tensors ``names``."""
    nodes = (node for batch in plan.schedule.batches for node in batch.nodes)
    return {node.name for node in nodes if node.work.target is None and node.work.spans[0].name in names}


def _check_space(plan: ApplyPlan, folder: Path) -> None:
    """Raise before anything is written where the disk cannot hold the result."""
    there = sum(file.stat().st_blocks * 512 for file in folder.iterdir())
    free = shutil.disk_usage(folder).free + there
    if free < plan.written:
        raise CapacityError(
            f"{folder.parent}: the result takes {plan.written / 1e9:.2f} GB, the disk has {free / 1e9:.2f} GB left; "
            "free some, or choose another output folder"
        )


def _fingerprint(plan: ApplyPlan) -> str:
    """What must be the same for a journal to be continued: options and inputs, not where or how fast they run."""
    options = {k: v for k, v in plan.options.items() if k not in ("memory", "device", "threads")}
    given = [[one.ref, one.weight, state_of_files(one.files)] for one in plan.given]
    return fingerprint(options, state(plan.base), given)
