"""Extract a LoRA from a full fine-tune: the truncated SVD of every weight's delta (PHLoRA, arXiv 2509.10971).

Headers first: what happens to every tensor is decided before one is read (``plan_extract``). Then batches of deltas
stream through read, compute and write; finished factors lie in a journal on disk, and the adapter is written from
there once all ranks are known.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.folder import OutputFolder
from mergekit_lr.graph.journal import Journal, fingerprint
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.report.extraction import ExtractReport
from mergekit_lr.report.manifest import state, versions
from mergekit_lr.verbs.extract.compute import Extraction, Finished
from mergekit_lr.verbs.extract.plan import ExtractPlan, plan_extract
from mergekit_lr.verbs.extract.result import assemble, in_memory, saturated, write


def extract(
    base: str | Path | Checkpoint | Mapping[str, Tensor],
    finetuned: str | Path | Checkpoint | Mapping[str, Tensor],
    out: str | Path | None = None,
    *,
    overwrite: bool = False,
    resume: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> ExtractReport:
    """Extract a LoRA from a full fine-tune and write it as a PEFT adapter.

    Args:
        base: the model that was fine-tuned: a folder, a file, a Hub id ``org/name@revision``, a dict of tensors.
        finetuned: the fine-tune, likewise.
        out: folder of the result; None keeps the adapter in memory (``report.adapter``).
        overwrite: replace an earlier result at ``out``. resume: continue a run that was cut off.
        progress: called with (bytes done, bytes in all, name) as batches finish.
        rank: of every module (64 if nothing else is said), or ``"auto"``: what stands above the noise floor that
            rounding to the storage dtype leaves in a delta.
        energy: keep at least this share of each delta's squared norm. error: keep each relative Frobenius error at or
            below this; 0 is lossless. size: one budget for all factors together, ``"200MB"``, spent where a stored
            number keeps most energy.
        max_rank, multiple_of: bounds on any rank so found. rank_pattern: regular expression to a rank of its own.
        include, exclude: regular expressions over names in memory.
        embeddings: changed tables and heads as ``"lora"``, in ``"full"``, or ``"skip"``. rest: norms, biases and what
            no factors can carry, in ``"full"`` where they changed, or ``"skip"``.
        vocab: when tables grew: ``"refuse"``, ``"keep"`` them in full, or ``"truncate"`` to the base's rows.
        dtype: of the factors; by default that of the fine-tune. memory, device, threads: see ``resources``.
        seed: of the random sketches.

    Returns:
        What was done and lost, per module and in total; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: bad input or a failed run; nothing is left at ``out``.
    """
    started = time.perf_counter()
    plan = plan_extract(base, finetuned, **options)
    for checkpoint in (plan.base, plan.finetuned):
        checkpoint.fetch()
    if out is None:
        with tempfile.TemporaryDirectory(prefix="lrmerge-") as scratch:
            journal = Journal(Path(scratch), "")
            compute(plan, journal, progress)
            return in_memory(plan, *assemble(plan, journal, None, started))
    inputs = [checkpoint.folder for checkpoint in (plan.base, plan.finetuned) if checkpoint.folder]
    with OutputFolder(out, overwrite=overwrite, resume=resume, inputs=inputs) as folder:
        journal = Journal(folder.partial, _fingerprint(plan), resume=resume)
        compute(plan, journal, progress)
        adapter, report = assemble(plan, journal, str(out), started)
        report = write(plan, adapter, report, folder.partial, started)
        journal.close()
    return report


def compute(plan: ExtractPlan, journal: Journal, progress: Callable[[Progress], None] | None) -> None:
    """Run every batch that the journal does not hold yet.

    With a byte budget the first look may have ended too early for some modules: those are looked at again, twice as
    deep, until the budget is spent where it keeps most. Each such decision is journaled behind the results it was made
    from, so that a resumed run does not make another one from results of mixed depths.
    """
    work = Extraction(plan.base, plan.finetuned, plan.resources.device, plan.dtype, plan.seed)

    def keep(batch: Batch, results: list[Finished]) -> None:
        for node, done in zip(batch.nodes, results, strict=True):
            journal.add(node.name, done.tensors, done.figures)

    current, look = plan, 1
    while True:
        decision = f"--size: look {look}"
        if decision not in journal:
            left = current.schedule.without(journal)
            run(left, read=work.read, compute=work.compute, write=keep, progress=progress)
            deeper = saturated(current, journal)
            if not deeper:
                return
            journal.add(decision, {}, deeper)
        current, look = current.deeper(journal.figures[decision]), look + 1


def _fingerprint(plan: ExtractPlan) -> str:
    """What must be the same for a journal to be continued: options and inputs, not where or how fast they run."""
    options = {k: v for k, v in plan.options.items() if k not in ("memory", "device", "threads")}
    return fingerprint(options, state(plan.base), state(plan.finetuned), versions())
