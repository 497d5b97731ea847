"""What stands beside the shards of a merged model: config, tokenizer, card, manifest; and its report."""

from __future__ import annotations

import json
import shutil
import time
from collections import Counter
from dataclasses import replace
from pathlib import Path

from mergekit_lr.checkpoint.checkpoint import STEMS, Checkpoint, read_config
from mergekit_lr.checkpoint.writer import total_bytes
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.report.card import notes_of
from mergekit_lr.report.manifest import FILE, manifest, write_manifest
from mergekit_lr.report.merging import MergedTensor, MergeReport
from mergekit_lr.report.merging_card import models_merged, write_merging_card
from mergekit_lr.verbs.apply.result import LEFT, SMALL
from mergekit_lr.verbs.merge.chat import write_template
from mergekit_lr.verbs.merge.config import renumbered
from mergekit_lr.verbs.merge.plan import MergePlan

GENERATION = "generation_config.json"


def report_of(plan: MergePlan, journal: Journal, out: str | None, started: float) -> MergeReport:
    """The report, from what the journal says of every tensor."""
    figures = journal.figures
    doc = plan.recipe.document
    return MergeReport(
        out=out,
        kind="model",
        method=plan.recipe.method.name,
        space="full",
        base=doc.base_model,
        models=tuple(plan.sources),
        tensors=tuple(
            MergedTensor(
                name=name,
                shape=plan.outputs[name][1],
                state=state,
                rule=plan.rules[name],
                squared_norm=figures[name].get("change", 0.0),
                rounding=figures[name].get("rounding", 0.0),
                opcm=figures[name].get("opcm"),
            )
            for name, state in plan.states.items()
        ),
        states=dict(Counter(plan.states.values())),
        files={name: total_bytes(held.values()) for name, held in plan.files.items()},
        config=plan.config,
        notes=plan.notes,
        vocabulary=plan.vocabulary_json,
        similarity=plan.similarity,
        read_bytes=plan.schedule.cost.read,
        written_bytes=plan.written,
        peak_bytes=peak_bytes(),
        seconds=time.perf_counter() - started,
    )


def write_beside(plan: MergePlan, report: MergeReport, folder: Path, started: float) -> MergeReport:
    """Config, small files, card and manifest into ``folder``; the report with what was left behind."""
    left = _copy_side_files(plan.template.checkpoint, folder)
    _write_tokenizer(plan, folder)
    if plan.config and plan.config != plan.template.checkpoint.config:
        (folder / "config.json").write_text(json.dumps(plan.config, indent=2) + "\n", encoding="utf-8")
    if left:
        report = replace(report, notes=(*report.notes, f"not copied along: {', '.join(sorted(left))}"))
    report = replace(report, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)
    origins = models_merged(plan.sources.values())
    report = replace(report, notes=(*report.notes, *notes_of(origins)))
    write_merging_card(report, plan.recipe.content, origins, folder, plan.options)
    inputs = {ref: source.checkpoint for ref, source in plan.sources.items()}
    content = report.to_json() | {"recipe": plan.recipe.content, "loras": _loras(plan)}
    write_manifest(folder, manifest("merge", inputs, plan.options, content))
    return report


def _write_tokenizer(plan: MergePlan, folder: Path) -> None:
    """The tokenizer and chat template that the recipe asks for, and the numbers of its tokens for generation."""
    if plan.vocabulary is not None:
        chosen = plan.vocabulary.chosen
        if chosen.made is not None or chosen.folder != plan.template.checkpoint.folder:
            chosen.save(folder)
        if content := read_config(folder / GENERATION):
            changed, _ = renumbered(content, plan.vocabulary)
            (folder / GENERATION).write_text(json.dumps(changed, indent=2) + "\n", encoding="utf-8")
    if plan.chat_template is not None:
        write_template(folder, plan.chat_template)


def _loras(plan: MergePlan) -> dict[str, list[dict[str, object]]]:
    """Files of the LoRAs that models were read with."""
    return {
        ref: [{"file": file.name, "bytes": file.stat().st_size} for file in source.files]
        for ref, source in plan.sources.items()
        if source.files
    }


def _copy_side_files(template: Checkpoint, folder: Path) -> list[str]:
    """Copy the small files beside the template's weights; the names of those that were too large."""
    origin, left = template.folder, []
    if origin is None:
        return []
    own = not template.named_file or template.files[0].name.startswith(STEMS)
    for path in sorted(origin.iterdir()):
        usual = path.name.endswith(LEFT) or path.name.startswith((".", "adapter_")) or path.name in ("README.md", FILE)
        if not path.is_file() or (usual and path.name != "config.json") or not (own or path.name == "config.json"):
            continue
        if path.stat().st_size > SMALL:
            left.append(path.name)
        else:
            shutil.copyfile(path, folder / path.name)
    return left
