"""The model card of a model with adapters baked in."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.report.application import ApplyReport
from mergekit_lr.report.card import write_card

BODY = """# {title}

`{base}` with {adapters}, {done} by [lrmerge](https://pypi.org/project/lrmerge/).

| adapter | weight |
|---|---|
{table}

| | |
|---|---|
| changed parameters | {changed} |
| norm of the whole change | {norm:.4g} |
| rounding error over the change | {error:.2%} ({rounding} to {dtype}) |

Every other tensor is the base's, byte for byte{converted}. Per-parameter figures are in `lrmerge.json`.
"""


def write_application_card(report: ApplyReport, folder: Path) -> None:
    """Write the card of a model with adapters baked in."""
    count = len(report.adapters)
    body = BODY.format(
        title=Path(report.out).name if report.out else "Model with adapters",
        base=report.base,
        adapters="an adapter" if count == 1 else f"{count} adapters",
        done="taken out" if report.unmerge else "baked in",
        table="\n".join(f"| `{ref}` | {weight:g} |" for ref, weight, _ in report.adapters),
        changed=len(report.changed),
        norm=report.norm,
        error=report.rounding_error,
        rounding=report.rounding,
        dtype=report.dtype,
        converted=f" but for {report.states['converted']} in another dtype" if "converted" in report.states else "",
    )
    write_card(folder, body, base_model=report.base, base_model_relation="merge", tags=["lrmerge", "merge"])
