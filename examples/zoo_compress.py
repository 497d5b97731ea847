"""How much of a real LoRA is left at lower ranks: accuracy at ranks 8, 4 and 2 of adapters trained at 16.

    python examples/zoo_compress.py ZOO [--tasks half,next] [--ranks 8,4,2] [--json OUT]

ZOO (or the environment variable LRMERGE_ZOO) is the folder that zoo_extract.py speaks of. Each of its LoRAs is
compressed through the public API, loaded by PEFT itself, and judged beside the accuracies in the zoo's README.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import tempfile
from pathlib import Path

from zoo_extract import script

import mergekit_lr as lr


def reference(zoo: Path) -> dict[str, dict[int, float]]:
    """Task to rank to test accuracy, from the table in the zoo's README."""
    table: dict[str, dict[int, float]] = {}
    for line in (zoo / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 8 and cells[6].count("/") == 3 and cells[2][:1].isdigit():
            table[cells[1]] = {r: float(v) / 100 for r, v in zip((8, 4, 2, 1), cells[6].split("/"), strict=True)}
    return table


def compressed_accuracy(zoo: Path, task: str, rank: int, out: Path) -> tuple[float, float]:
    """(test accuracy as PEFT loads it, energy kept) of the task's LoRA compressed to ``rank``."""
    evaluate = script(zoo, "evaluate")
    report = lr.compress(zoo / "lora" / task, out, rank=rank)
    return evaluate.accuracy(evaluate.load_encoder(out), task), report.energy


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?", default=os.environ.get("LRMERGE_ZOO"))
    parser.add_argument("--tasks", help="default: all that the zoo has")
    parser.add_argument("--ranks", default="8,4,2")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.zoo is None:
        parser.error("give the zoo's folder, or set LRMERGE_ZOO")
    zoo = Path(args.zoo).resolve()
    known, rows = reference(zoo), []
    print(f"{'task':10}{'rank':>5}{'ours':>8}{'table':>8}{'ours - table':>14}{'energy kept':>13}")
    with tempfile.TemporaryDirectory() as work:
        for task in args.tasks.split(",") if args.tasks else known:
            for rank in map(int, args.ranks.split(",")):
                found, energy = compressed_accuracy(zoo, task, rank, Path(work) / f"{task}-{rank}")
                table = known[task].get(rank, math.nan)
                rows.append({"task": task, "rank": rank, "accuracy": found, "table": table, "energy": energy})
                print(f"{task:10}{rank:5}{found:8.1%}{table:8.1%}{100 * (found - table):+10.1f} pts{energy:13.1%}")
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
