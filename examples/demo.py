"""What is left of a fine-tune in the LoRA extracted from it: loss on code that no checkpoint has seen.

    python examples/demo.py [OUT]

Extracts the embedded fine-tune at ranks 2, 4, 8, 16 and 32 into OUT/rank-R (default build/demo) and puts each
adapter back on the base. The model runs in plain torch (tiny_llama.py); PEFT loads the same folders.
"""

from __future__ import annotations

import sys
from pathlib import Path

from tiny_llama import Weights, load, loss, write_on

import mergekit_lr as lr
from mergekit_lr.adapter.peft import open_peft
from mergekit_lr.checkpoint.parameter import Kind

DEMO = Path(__file__).resolve().parent / "demo"
RANKS = (2, 4, 8, 16, 32)


def with_adapter(base: Weights, adapter: lr.Adapter) -> Weights:
    """The base's weights with the adapter's changes added."""
    weights = base | {name: tensor.float() for name, tensor in adapter.saved.items()}
    for name, change in adapter.weights.items():
        delta = change.delta.dense()
        weights[name] = base[name] + (delta.T if change.kind is Kind.EMBEDDING else delta)
    for name, (rows, values) in adapter.token_rows.items():
        weights[name] = base[name].index_copy(0, base[name].new_tensor(rows).long(), values.float())
    return weights


def kilobytes(folder: Path) -> str:
    return f"{sum(file.stat().st_size for file in folder.glob('*.safetensors')) / 1000:.0f} kB"


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else Path("build/demo")
    text = (DEMO / "heldout.txt").read_text()
    config, base = load(DEMO / "base")
    _, finetuned = load(DEMO / "finetuned")
    first, last = loss(config, base, text), loss(config, finetuned, text)

    print(f"{'':20}{'size':>8}{'loss':>8}{'of the gain':>13}")
    print(f"{'base':20}{kilobytes(DEMO / 'base'):>8}{first:8.3f}")
    weights = base
    for rank in RANKS:
        folder = out / f"rank-{rank}"
        lr.extract(DEMO / "base", DEMO / "finetuned", folder, rank=rank, overwrite=True)
        weights = with_adapter(base, open_peft(folder))
        now = loss(config, weights, text)
        print(f"{f'base + rank {rank}':20}{kilobytes(folder):>8}{now:8.3f}{(first - now) / (first - last):13.0%}")
    print(f"{'fine-tune':20}{kilobytes(DEMO / 'finetuned'):>8}{last:8.3f}{1:13.0%}")

    for name, model in ("base", base), (f"base + rank {RANKS[-1]}", weights), ("fine-tune", finetuned):
        print(f"\n{name} writes: {write_on(config, model, '    def ', 160)!r}")


if __name__ == "__main__":
    main()
