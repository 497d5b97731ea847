"""Convert an adapter between dialects, types and layouts of experts: lossless where the formats allow it."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lr.adapter import experts
from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.components import named_for
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.graph.run import Progress, run
from mergekit_lr.report.compression import AdapterReport, ModuleChange
from mergekit_lr.verbs.adapter_destination import Destination
from mergekit_lr.verbs.convert.compute import Done, converted
from mergekit_lr.verbs.convert.plan import HOLDS_ADDED, ConvertPlan, plan_convert


def convert(
    adapter: str | Path | Adapter,
    out: str | Path | None = None,
    *,
    to: str,
    overwrite: bool = False,
    progress: Callable[[Progress], None] | None = None,
    **options: Any,
) -> AdapterReport:
    """Convert an adapter to another dialect.

    Args:
        adapter: a PEFT folder of any type, a file of any dialect, a Hub id, or an adapter in memory.
        out: the result: a folder for ``peft``, else a file; None keeps it in memory.
        to: ``peft``, ``kohya``, ``lycoris``, ``diffusers`` or ``comfy``.
        overwrite: replace an earlier result at ``out``. progress: called with (bytes done, bytes in all, name).
        experts: ``"fused"`` or ``"per-expert"``: on stacks, or on single experts as servers want them.
        dora: ``"keep"`` magnitudes, or ``"fold"`` what they do into factors; that needs ``base``.
        base: the base model, for the names of its modules, their kinds, and where its weights are needed.
        component: which part of a pipeline a PEFT folder is of: ``unet``, ``transformer``, ``text_encoder`` ...
        rank, energy, error, max_rank, multiple_of: of changes that are not of low rank, as in ``extract``.
        dtype: of all factors; by default they stay as they are. memory, device, threads: see ``resources``.
        seed: of the random sketches.

    Returns:
        What was done and lost, per module and in total; also written as ``lrmerge.json``.

    Raises:
        LrmergeError: bad input, or what the dialect cannot hold; nothing is left at ``out``.
    """
    plan = plan_convert(adapter, to=to, **options)
    if out is None:
        done = transform(plan, progress)
        return replace(_report(plan, done), adapter=done.adapter)
    with Destination(out, to, overwrite=overwrite, inputs=plan.source.inputs) as destination:
        done = transform(plan, progress)
        return destination.write(
            done.adapter, _report(plan, done), plan.source, plan.base, options=plan.options, started=plan.started
        )


class Transformed(NamedTuple):
    """The adapter as it will be written, what became of each module, and names of other components left out."""

    adapter: Adapter
    changes: tuple[ModuleChange, ...]
    left_out: tuple[str, ...]


def transform(plan: ConvertPlan, progress: Callable[[Progress], None] | None = None) -> Transformed:
    """Factors for everything that needs them, module by module; then experts, names and dtype."""
    done: list[Done] = []
    run(
        plan.schedule,
        read=lambda batch: None,
        compute=lambda batch, _: [one for node in batch.nodes for one in converted(plan, node.work)],
        write=lambda batch, finished: done.extend(finished),
        progress=progress,
    )
    adapter = replace(
        plan.source.adapter,
        weights={one.name: one.weight for one in done if one.weight is not None},
        saved={**plan.source.adapter.saved, **{one.name: one.saved for one in done if one.saved is not None}},
        added=dict(plan.source.adapter.added) if plan.to in HOLDS_ADDED else {},
        base=plan.source.adapter.base or (plan.base.checkpoint.ref if plan.base else None),
    )
    changes = [one.change for one in done if one.change is not None]
    if plan.experts is not None:
        layout = plan.base.layout if plan.base else None
        adapter = (experts.split if plan.experts == "per-expert" else experts.fuse)(adapter, layout)
        state = "split" if plan.experts == "per-expert" else "fused"
        changes = [c if c.name in adapter.weights or not c.rank else replace(c, state=state) for c in changes]
    if plan.dtype is not None:
        weights = {name: replace(w, delta=w.delta.to(plan.dtype)) for name, w in adapter.weights.items()}
        adapter = replace(adapter, weights=weights)
    renamed = named_for(adapter, plan.source.dialect, plan.to, plan.component)
    gone = {"state": "left out", "rank": 0, "stored": 0}
    changes = [replace(change, **gone) if change.name in renamed.left_out else change for change in changes]
    return Transformed(renamed.adapter, tuple(changes), renamed.left_out)


def _report(plan: ConvertPlan, done: Transformed) -> AdapterReport:
    source = plan.source.adapter
    return AdapterReport(
        verb="convert",
        out=None,
        source=plan.source.ref,
        dialect=plan.source.dialect,
        to=plan.to,
        target=None,
        base=done.adapter.base,
        dtype=str(plan.stored).removeprefix("torch."),
        modules=done.changes,
        others=plan.others(done.left_out),
        notes=tuple(str(note) for note in source.config.get("notes", ())),
        bytes_before=plan.source.nbytes,
        bytes_after=sum(w.delta.A.nbytes + w.delta.B.nbytes for w in done.adapter.weights.values()),
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - plan.started,
    )
