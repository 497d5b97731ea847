"""The model card of an extracted adapter."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.report.card import write_card
from mergekit_lr.report.extraction import ExtractReport

BODY = """# {title}

A LoRA extracted from the full fine-tune `{finetuned}` of `{base}` with
[lrmerge](https://pypi.org/project/lrmerge/): the truncated SVD of every weight's change (PHLoRA, arXiv 2509.10971).

| | |
|---|---|
| modules | {modules} |
| total rank | {rank} |
| size | {size:.1f} MB, {share:.2%} of the fine-tune |
| energy kept | {energy:.2%} of the squared norm of the whole change |
| relative Frobenius error | {error:.4f} |
| worst module | {worst} |

{left_out}
## Load it

```python
from peft import PeftModel
from transformers import {loader}

base = {loader}.from_pretrained("{base}")
model = PeftModel.from_pretrained(base, "PATH_OR_NAME_OF_THIS_ADAPTER")
```

Per-module figures are in `lrmerge.json`.
"""


def write_extraction_card(report: ExtractReport, architecture: str, folder: Path) -> None:
    """Write the card of an extracted adapter. ``architecture`` is the class that the base's config names."""
    worst = report.worst
    left_out = [other for other in report.others if other.state == "left out" and other.squared_norm > 0]
    share = sum(other.squared_norm for other in left_out) / report.changed if report.changed else 0.0
    named = ", ".join(f"`{other.name}`" for other in left_out[:5]) + (" ..." if len(left_out) > 5 else "")
    body = BODY.format(
        title=Path(report.out).name if report.out else "Extracted LoRA",
        base=report.base,
        finetuned=report.finetuned,
        modules=len(report.modules),
        rank=report.total_rank,
        size=report.adapter_bytes / 1e6,
        share=report.adapter_bytes / max(report.finetuned_bytes, 1),
        energy=report.energy,
        error=report.error,
        worst=f"`{worst.name}`, error {worst.error:.4f} at rank {worst.rank}" if worst else "none",
        left_out=f"Left out, {share:.2%} of the change: {named}.\n" if left_out else "",
        loader=architecture,
    )
    tags = ["lora", "lrmerge", "phlora"]
    write_card(folder, body, base_model=report.base, base_model_relation="adapter", library_name="peft", tags=tags)
