"""The model card of an adapter that was compressed or converted."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.report.adapter_card import WORST, base_of, named_base, spectrum, unread
from mergekit_lr.report.card import HOME, Content, write_card
from mergekit_lr.report.citations import COMPRESS
from mergekit_lr.report.command import command
from mergekit_lr.report.compression import AdapterReport
from mergekit_lr.report.inputs import Input, stated_hub_id
from mergekit_lr.report.loading import loading_an_adapter, pipeline_tag
from mergekit_lr.report.markdown import bullets, code, plain, table
from mergekit_lr.report.quantities import size
from mergekit_lr.report.spectrum import Spectrum


def write_adapter_card(
    report: AdapterReport, inputs: Sequence[Input], options: Mapping[str, Any], folder: Path
) -> None:
    """Write the card of the PEFT adapter in ``folder``. ``inputs``: the adapter, and the base where it was given."""
    source, *bases = inputs
    hub = bases[0].hub if bases else stated_hub_id(report.base, source.card.get("base_model"))
    base = base_of(bases[0], config=bases[0].config) if bases else named_base(report.base, hub)
    compressed = report.verb == "compress"
    done = f"compressed to lower ranks (LoRA-Squeeze, arXiv {COMPRESS})" if compressed else "converted"
    if not compressed and report.dialect != "peft":
        done += f" from the dialect {plain(report.dialect)}"
    content = Content(
        what=f"The LoRA {code(source.name)}, {done} by [lrmerge]({HOME}).",
        sections={
            "Load it": loading_an_adapter(folder, base),
            "What it holds": "\n\n".join([_totals(report), *_worst(report), *_spectra(report, folder)]),
            "Limits": bullets([*_limits(report), *([unread(hub)] if hub and not bases else [])]),
        },
        notes=report.notes,
        again=command(report.verb, [source.address], options, inputs),
        papers=[COMPRESS] if compressed else [],
        base_model=[hub] if hub else [],
        relation="adapter",
        tags=["lora", "lrmerge", report.verb],
        library_name="peft",
        pipeline_tag=pipeline_tag(base.config),
    )
    write_card(folder, report.out, content, inputs)


def _totals(report: AdapterReport) -> str:
    rows = [
        ["tensors", ", ".join(f"{count} {state}" for state, count in report.states.items())],
        ["sum of all ranks", f"{report.rank_before} before, {report.total_rank} now"],
        ["size", f"{size(report.bytes_before)} before, {size(report.bytes_after)} now"],
        ["energy kept", f"{report.energy:.2%} of the squared norm of the adapter's change"],
        ["relative Frobenius error", f"{report.error:.4f}"],
        ["dtype of the factors", report.dtype],
    ]
    return table(["figure", "value"], rows)


def _worst(report: AdapterReport) -> list[str]:
    worst = [m for m in sorted(report.modules, key=lambda module: -module.error)[:WORST] if m.error > 0]
    if not worst:
        return []
    rows = [
        [
            code(m.name),
            f"{m.rank_before} to {m.rank}",
            f"{m.squared_norm**0.5:.4g}",
            f"{m.energy:.2%}",
            f"{m.error:.4f}",
        ]
        for m in worst
    ]
    head = f"The {len(rows)} of {len(report.modules)} modules with the largest relative error"
    return [f"{head}:\n\n{table(['module', 'rank', 'norm', 'energy kept', 'error'], rows)}"]


def _spectra(report: AdapterReport, folder: Path) -> list[str]:
    return spectrum((Spectrum(m.name, m.singular_values, m.squared_norm) for m in report.modules), folder)


def _limits(report: AdapterReport) -> list[str]:
    lost = 1 - report.energy
    lines = [f"{lost:.2%} of the squared norm of the adapter's change is lost." if lost > 0 else "Nothing is lost."]
    gone = [m.name for m in report.modules if m.state in ("dropped", "left out")]
    gone += [other.name for other in report.others if other.state == "left out"]
    if gone:
        lines.append(f"Left out: {', '.join(map(code, gone[:5]))}{' ...' if len(gone) > 5 else '.'}")
    lines.append("Energy is measured on weights. How well the result does its task was not measured.")
    return lines
