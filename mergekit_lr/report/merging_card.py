"""The card of a merged model or adapter: what was merged how, with the recipe that makes it again."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.report.card import write_card
from mergekit_lr.report.merging import MergeReport

BODY = """# {title}

{what} merged by `{method}`{space} with [lrmerge](https://pypi.org/project/lrmerge/).

{models}

| | |
|---|---|
| tensors | {states} |
| norm of the change | {norm:.4g} |
| lost of it by {loss} | {error:.2%} |

The recipe:

```yaml
{recipe}
```

Per-tensor figures are in `lrmerge.json`.
"""


def write_merging_card(report: MergeReport, recipe: str, folder: Path) -> None:
    """Write the card of a merge; ``recipe``: the text of its document."""
    body = BODY.format(
        title=Path(report.out).name if report.out else "Merge",
        what="A model" if report.kind == "model" else "A LoRA adapter",
        method=report.method,
        space="" if report.space == "full" else f" in the space `{report.space}`",
        models="\n".join(f"- `{ref}`" for ref in report.models),
        states=", ".join(f"{count} {state}" for state, count in report.states.items()),
        norm=report.norm,
        loss="rounding" if report.kind == "model" else "truncation",
        error=report.rounding_error,
        recipe=recipe.strip().replace("```", "'''"),
    )
    adapter = {"library_name": "peft", "base_model_relation": "adapter"} if report.kind == "adapter" else {}
    write_card(
        folder,
        body,
        base_model=report.base if report.kind == "adapter" else list(report.models),
        **({"base_model_relation": "merge"} | adapter),
        tags=["lrmerge", "merge"],
    )
