"""The model card of a model with adapters baked in."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from mergekit_lr.report.adapter_card import WORST
from mergekit_lr.report.application import ApplyReport
from mergekit_lr.report.card import HOME, Content, write_card
from mergekit_lr.report.command import command
from mergekit_lr.report.inputs import Input
from mergekit_lr.report.loading import library, loading_a_model, pipeline_tag
from mergekit_lr.report.markdown import bullets, code, table


def write_application_card(
    report: ApplyReport, inputs: Sequence[Input], options: Mapping[str, Any], folder: Path
) -> None:
    """Write the card of the model in ``folder``. ``inputs``: the base, and each adapter."""
    base, *adapters = inputs
    count = "an adapter" if len(adapters) == 1 else f"{len(adapters)} adapters"
    done = "taken out" if report.unmerge else "baked in"
    given = [
        one.address + ("" if weight == 1 else f":{weight:g}")
        for one, (_, weight, _) in zip(adapters, report.adapters, strict=True)
    ]
    weights = [[code(one.name), f"{weight:g}"] for one, (_, weight, _) in zip(adapters, report.adapters, strict=True)]
    content = Content(
        what=f"{code(base.name)} with {count} {done} by [lrmerge]({HOME}).\n\n{table(['adapter', 'weight'], weights)}",
        sections={
            "Load it": loading_a_model(folder),
            "What changed": f"{_totals(report)}\n\n{_worst(report)}",
            "Limits": bullets(_limits(report)),
        },
        notes=report.notes,
        again=command("apply", [base.address, *given], options, inputs),
        papers=[],
        base_model=[repo for one in inputs for repo in one.ids],
        relation="merge",
        tags=["lrmerge", "merge"],
        library_name=library(report.config),
        pipeline_tag=pipeline_tag(report.config),
    )
    write_card(folder, report.out, content, inputs)


def _totals(report: ApplyReport) -> str:
    rows = [
        ["tensors", ", ".join(f"{count} {state}" for state, count in report.states.items())],
        ["changed parameters", str(len(report.changed))],
        ["norm of the whole change", f"{report.norm:.4g}"],
        ["rounding error over the change", f"{report.rounding_error:.2%} ({report.rounding} to {report.dtype})"],
    ]
    return table(["figure", "value"], rows)


def _worst(report: ApplyReport) -> str:
    worst = sorted(report.changed, key=lambda figures: -figures.rounding_error)[:WORST]
    rows = [[code(f.name), f.by, f"{f.norm:.4g}", f"{f.rounding_error:.2%}"] for f in worst]
    head = f"The {len(rows)} of {len(report.changed)} parameters of whose change rounding spoils most"
    return f"{head}:\n\n{table(['parameter', 'changed by', 'norm of the change', 'rounding error'], rows)}"


def _limits(report: ApplyReport) -> list[str]:
    converted = report.states.get("converted")
    other = f", but for {converted} in another dtype" if converted else ""
    return [
        f"Every other tensor is the base's, byte for byte{other}.",
        "Changes are measured on weights. How well the result does its task was not measured.",
    ]
