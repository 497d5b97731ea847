"""What stands beside the shards of a result: config, tokenizer and other small files, card, manifest, report."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

from mergekit_lr.checkpoint.checkpoint import STEMS
from mergekit_lr.checkpoint.writer import total_bytes
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.report.application import AppliedFigures, ApplyReport, rounding_notes
from mergekit_lr.report.application_card import write_application_card
from mergekit_lr.report.card import notes_of
from mergekit_lr.report.inputs import Input
from mergekit_lr.report.manifest import FILE, manifest, write_manifest
from mergekit_lr.verbs.apply.plan import ApplyPlan, Task

# Weights and what belongs to training; everything else small at the top of a model's folder goes along.
LEFT = (
    ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".gguf", ".onnx", ".h5", ".msgpack", ".index.json", ".partial",
)  # fmt: skip
SMALL = 64 << 20  # bytes; the largest tokenizers take about half of that
TOKENIZER = ("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "chat_template*")


def report_of(plan: ApplyPlan, journal: Journal, out: str | None, started: float) -> ApplyReport:
    """The report, from what the journal says of every node."""
    norms: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])
    for batch in plan.schedule.batches:
        for node in batch.nodes:
            task: Task = node.work
            if task.target is not None:
                figures = journal.figures[node.name]
                norms[task.target.name][0] += figures["change"]
                norms[task.target.name][1] += figures["rounding"]
    changed = tuple(
        AppliedFigures(t.name, str(t.parameter.kind), t.parameter.shape, t.how, *norms[t.name]) for t in plan.targets
    )
    dtype, rounding = str(plan.dtype).removeprefix("torch."), plan.options["rounding"]
    return ApplyReport(
        out=out,
        base=plan.base.ref,
        adapters=tuple((given.ref, given.weight, given.dialect) for given in plan.given),
        unmerge=plan.options["unmerge"],
        dtype=dtype,
        rounding=rounding,
        layout=plan.layout.source,
        changed=changed,
        states=dict(Counter(plan.states.values())),
        files={name: total_bytes(held.values()) for name, held in plan.files.items()},
        config=plan.config,
        notes=(*plan.notes, *rounding_notes(changed, dtype, rounding)),
        read_bytes=plan.schedule.cost.read,
        written_bytes=plan.written,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - started,
    )


def write_beside(plan: ApplyPlan, report: ApplyReport, folder: Path, started: float) -> ApplyReport:
    """Small files, config, card and manifest into ``folder``; the report with what was left behind."""
    left = []
    for file, goes in side_files(plan):
        if goes:
            shutil.copyfile(file, folder / file.name)
        else:
            left.append(file.name)
    if plan.config != plan.base.config:
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    if left:
        report = replace(report, notes=(*report.notes, f"of the base's folder not copied: {', '.join(sorted(left))}"))
    report = replace(report, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)
    origins = [Input.of("base", plan.base.ref, plan.base.folder, config=plan.base.config)]
    origins += [Input.of("adapter", one.ref, one.files[0].parent if one.files else None) for one in plan.given]
    report = replace(report, notes=(*report.notes, *notes_of(origins)))
    write_application_card(report, origins, plan.options, folder)
    content = report.to_json()
    content["adapters"] = [
        entry | {"files": [{"file": file.name, "bytes": file.stat().st_size} for file in given.files]}
        for entry, given in zip(content["adapters"], plan.given, strict=True)
    ]
    write_manifest(folder, manifest("apply", {"base": plan.base}, plan.options, content))
    return report


def side_files(plan: ApplyPlan) -> Iterator[tuple[Path, bool]]:
    """Files beside the base's weights, and whether they go along; those that nobody would expect are not named.

    Where the vocabulary has another size, the tokenizer is the adapter's.
    """
    folder = plan.base.folder
    if folder is None:
        return
    own = not plan.base.named_file or plan.base.files[0].name.startswith(STEMS)
    for path in sorted(folder.iterdir()):
        usual = path.name.endswith(LEFT) or path.name.startswith((".", "adapter_")) or path.name in ("README.md", FILE)
        if path.name == "config.json" or (own and not usual):
            yield path, path.is_file() and path.stat().st_size <= SMALL
    if plan.resized:
        for adapter in {file.parent for given in plan.given for file in given.files}:
            yield from ((path, True) for pattern in TOKENIZER for path in sorted(adapter.glob(pattern)))
