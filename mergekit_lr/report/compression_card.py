"""The model card of an adapter that was compressed or converted."""

from __future__ import annotations

from pathlib import Path

from mergekit_lr.report.card import write_card
from mergekit_lr.report.compression import AdapterReport

BODY = """# {title}

{what} with [lrmerge](https://pypi.org/project/lrmerge/).

| | |
|---|---|
| modules | {modules} |
| total rank | {before} before, {after} now |
| size | {size_before:.1f} MB before, {size_after:.1f} MB now |
| energy kept | {energy:.2%} of the squared norm of the change |
| relative Frobenius error | {error:.4f} |
| worst module | {worst} |

{notes}
## Load it

```python
{load}
```

Per-module figures are in `lrmerge.json`.
"""

LOAD = {
    None: """from peft import PeftModel

model = PeftModel.from_pretrained(base_model, "PATH_OR_NAME_OF_THIS_ADAPTER")""",
    "vllm": """from vllm import LLM
from vllm.lora.request import LoRARequest

llm = LLM("{base}", enable_lora=True, max_lora_rank={rank})
llm.generate(prompts, lora_request=LoRARequest("adapter", 1, "PATH_OF_THIS_ADAPTER"))""",
}


def write_adapter_card(report: AdapterReport, folder: Path) -> None:
    """Write the card of a PEFT folder: what it came from, what it lost, how to load it."""
    source = f"`{Path(report.source).name}`"
    what = {
        "compress": f"The LoRA {source} compressed to lower ranks (LoRA-Squeeze, arXiv 2602.10993)",
        "convert": f"The adapter {source}, converted from {report.dialect}",
    }[report.verb]
    rank = max((m.rank for m in report.modules), default=0)
    load = LOAD.get(report.target, LOAD[None]).format(base=report.base or "BASE", rank=rank)
    worst = report.worst
    body = BODY.format(
        title=Path(report.out).name if report.out else "Adapter",
        what=what,
        modules=len(report.modules),
        before=report.rank_before,
        after=report.total_rank,
        size_before=report.bytes_before / 1e6,
        size_after=report.bytes_after / 1e6,
        energy=report.energy,
        error=report.error,
        worst=f"`{worst.name}`, error {worst.error:.4f} at rank {worst.rank}" if worst else "none",
        notes="".join(f"- {note}\n" for note in report.notes),
        load=load,
    )
    relation = "adapter" if report.base else None
    tags = ["lora", "lrmerge", report.verb]
    write_card(folder, body, base_model=report.base, base_model_relation=relation, library_name="peft", tags=tags)
