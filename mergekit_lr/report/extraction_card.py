"""The model card of an extracted adapter."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.report.adapter_card import WORST, base_of, spectrum
from mergekit_lr.report.card import HOME, Content, write_card
from mergekit_lr.report.citations import EXTRACT
from mergekit_lr.report.command import command
from mergekit_lr.report.extraction import ExtractReport
from mergekit_lr.report.inputs import Input
from mergekit_lr.report.loading import loading_an_adapter, pipeline_tag
from mergekit_lr.report.markdown import bullets, code, plain, table
from mergekit_lr.report.quantities import size
from mergekit_lr.report.spectrum import Spectrum


def write_extraction_card(
    report: ExtractReport, inputs: Sequence[Input], options: Mapping[str, Any], folder: Path
) -> None:
    """Write the card of the adapter in ``folder``. ``inputs``: base and fine-tune. ``options``: of the run."""
    base, finetuned = inputs
    # The adapter is for the class that the fine-tune is of: it may have a head that the base lacks.
    target = base_of(base, config=finetuned.config or base.config)
    what = (
        f"A LoRA extracted from the full fine-tune {code(finetuned.name)} of {code(base.name)} by "
        f"[lrmerge]({HOME}): the truncated SVD of what fine-tuning changed in every weight (PHLoRA, arXiv {EXTRACT})."
    )
    content = Content(
        what=what,
        sections={
            "Load it": loading_an_adapter(folder, target),
            "What it holds": "\n\n".join([_totals(report), _worst(report), *_spectra(report, folder)]),
            "Limits": _limits(report),
        },
        notes=report.notes,
        again=command("extract", [one.address for one in inputs], options, inputs),
        papers=[EXTRACT],
        base_model=[base.hub] if base.hub else [],
        relation="adapter",
        tags=["lora", "lrmerge", "phlora"],
        library_name="peft",
        pipeline_tag=pipeline_tag(target.config),
    )
    write_card(folder, report.out, content, inputs)


def _totals(report: ExtractReport) -> str:
    share = report.adapter_bytes / max(report.finetuned_bytes, 1)
    states = ", ".join(f"{count} {state}" for state, count in report.states.items())
    rows = [
        ["tensors", states],
        ["sum of all ranks", str(report.total_rank)],
        ["size", f"{size(report.adapter_bytes)}, {share:.2%} of the fine-tune"],
        ["energy kept", f"{report.energy:.2%} of the squared norm of the whole change"],
        ["relative Frobenius error", f"{report.error:.4f}"],
        ["dtype of the factors", report.dtype],
    ]
    return table(["figure", "value"], rows)


def _worst(report: ExtractReport) -> str:
    worst = sorted(report.modules, key=lambda module: -module.error)[:WORST]
    rows = [
        [code(m.name), str(m.rank), f"{m.squared_norm**0.5:.4g}", f"{m.energy:.2%}", f"{m.error:.4f}"] for m in worst
    ]
    head = f"The {len(rows)} of {len(report.modules)} modules with the largest relative error"
    return f"{head}:\n\n{table(['module', 'rank', 'norm', 'energy kept', 'error'], rows)}" if rows else "No factors."


def _spectra(report: ExtractReport, folder: Path) -> list[str]:
    return spectrum((Spectrum(m.name, m.singular_values, m.squared_norm) for m in report.modules), folder)


def _limits(report: ExtractReport) -> str:
    lost = 1 - report.energy
    lines = [f"{lost:.2%} of the squared norm of the change is not in it." if lost > 0 else "Nothing is lost."]
    left_out = [other for other in report.others if other.state == "left out" and other.squared_norm > 0]
    if left_out:
        share = sum(other.squared_norm for other in left_out) / report.changed
        named = ", ".join(code(other.name) for other in left_out[:5]) + (" ..." if len(left_out) > 5 else "")
        reasons = ", ".join(sorted({other.reason for other in left_out if other.reason}))
        lines.append(f"Left out, {share:.2%} of the change: {named}" + (f" ({plain(reasons)})." if reasons else "."))
    lines.append("Energy is measured on weights. How well the result does its task was not measured.")
    return bullets(lines)
