"""How much of a real fine-tune is left in a LoRA extracted from it: accuracy at ranks 4, 16 and 64.

    python examples/zoo_extract.py ZOO [--tasks half,roletail] [--ranks 4,16,64] [--json OUT]

ZOO (or the environment variable LRMERGE_ZOO) is a folder with a sentence encoder, its fine-tunes, the tasks'
test sets, and two scripts that are used as they are: full.py makes the fine-tunes, evaluate.py measures them.
Each fine-tune is extracted through the public API, loaded by PEFT itself, and judged beside two references:
the accuracies in the zoo's README, and the best approximation of the same rank, from float64 Gram matrices.
"""

from __future__ import annotations

import argparse
import importlib
import json
import math
import os
import sys
import tempfile
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor, nn

import mergekit_lr as lr

Deltas = dict[str, Tensor]


def script(zoo: Path, name: str) -> ModuleType:
    """One of the zoo's own scripts, as a module."""
    if str(zoo) not in sys.path:
        sys.path.insert(0, str(zoo))
    return importlib.import_module(name)


def deltas(base: Path, finetuned: Path) -> Deltas:
    """Module name to exact float32 delta (d_out, d_in), of every matrix that changed."""
    found = {}
    for file in sorted(finetuned.glob("*.safetensors")):
        with safe_open(base / file.name, "pt") as before, safe_open(file, "pt") as after:
            for key in after.keys():  # noqa: SIM118 (no mapping)
                delta = after.get_tensor(key).float() - before.get_tensor(key).float()
                if delta.ndim == 2 and delta.any():
                    found[key.removesuffix(".weight")] = delta
    return found


class Best(NamedTuple):
    """The best approximation of one delta at any rank, from the Gram matrix of its shorter side."""

    energies: Tensor  # (k,) squared singular values, ascending, float64
    vectors: Tensor  # (k, k) their singular vectors on that side, columns, float64

    def error(self, rank: int) -> float:
        """Frobenius error of the best approximation of that rank."""
        return math.sqrt(self.energies[:-rank].clamp(min=0).sum().item())

    def project(self, delta: Tensor, rank: int) -> Tensor:
        """The best approximation itself."""
        top = self.vectors[:, -rank:]
        projector = (top @ top.T).float()
        return projector @ delta if delta.shape[0] <= delta.shape[1] else delta @ projector


def best(delta: Tensor) -> Best:
    wide = (delta if delta.shape[0] <= delta.shape[1] else delta.T).double()
    return Best(*torch.linalg.eigh(wide @ wide.T))


class Loaded(NamedTuple):
    """An adapter as PEFT sees it."""

    encoder: nn.Module  # the base with the adapter merged into it
    deltas: Deltas
    missing: list[str]
    unexpected: list[str]


def load(evaluate: ModuleType, base: Path, adapter: Path) -> Loaded:
    """The zoo's base with an adapter, loaded by the real PEFT."""
    import peft

    model = peft.get_peft_model(evaluate.load_encoder(base), peft.PeftConfig.from_pretrained(str(adapter)))
    result = peft.set_peft_model_state_dict(model, peft.load_peft_weights(str(adapter), device="cpu"))
    layers: dict[str, Any] = {n: m for n, m in model.named_modules() if isinstance(m, peft.tuners.lora.LoraLayer)}
    changes = {n.removeprefix("base_model.model."): m.get_delta_weight("default").detach() for n, m in layers.items()}
    missing = [key for key in result.missing_keys if "lora_" in key or "modules_to_save" in key]
    return Loaded(model.merge_and_unload(), changes, missing, list(result.unexpected_keys))


def excess(found: Deltas, wanted: Deltas, bests: dict[str, Best], rank: int) -> float:
    """The worst module's error over the smallest error possible at that rank, minus one."""
    if found.keys() != wanted.keys():
        raise ValueError(f"modules differ: {sorted(found.keys() ^ wanted.keys())}")
    errors = {name: torch.linalg.vector_norm((found[name] - wanted[name]).double()).item() for name in wanted}
    return max(error / bests[name].error(rank) - 1 for name, error in errors.items())


def with_deltas(encoder: nn.Module, changes: Deltas) -> nn.Module:
    """The encoder with a delta added to each named module's weight, in place."""
    with torch.no_grad():
        for name, delta in changes.items():
            encoder.get_parameter(f"{name}.weight").add_(delta)
    return encoder


def reference(zoo: Path) -> dict[str, dict[int, float]]:
    """Task to rank to test accuracy, from the table in the zoo's README."""
    table: dict[str, dict[int, float]] = {}
    for line in (zoo / "README.md").read_text().splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 8 and cells[5].count("/") == 2 and cells[2][:1].isdigit():
            table[cells[1]] = {r: float(v) / 100 for r, v in zip((4, 16, 64), cells[5].split("/"), strict=True)}
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?", default=os.environ.get("LRMERGE_ZOO"))
    parser.add_argument("--tasks", default="half,roletail", help="others are trained first, a minute each")
    parser.add_argument("--ranks", default="4,16,64")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.zoo is None:
        parser.error("give the zoo's folder, or set LRMERGE_ZOO")
    zoo = Path(args.zoo).resolve()
    evaluate, full = script(zoo, "evaluate"), script(zoo, "full")
    known, rows = reference(zoo), []
    print(f"{'task':10}{'rank':>5}{'ours':>8}{'table':>8}{'ours - table':>14}{'best rank':>11}{'worst excess':>14}")
    with tempfile.TemporaryDirectory() as work:
        for task in args.tasks.split(","):
            finetuned = full.build(task, work)
            wanted = deltas(zoo / "base", finetuned)
            bests = {name: best(delta) for name, delta in wanted.items()}
            for rank in map(int, args.ranks.split(",")):
                out = Path(work) / f"{task}-{rank}"
                lr.extract(zoo / "base", finetuned, out, rank=rank)
                loaded = load(evaluate, zoo / "base", out)
                if loaded.missing or loaded.unexpected:
                    raise SystemExit(f"{out}: PEFT misses {loaded.missing}, does not expect {loaded.unexpected}")
                ideal = {name: bests[name].project(delta, rank) for name, delta in wanted.items()}
                row = {
                    "task": task,
                    "rank": rank,
                    "accuracy": evaluate.accuracy(loaded.encoder, task),
                    "table": known[task].get(rank, math.nan),
                    "best": evaluate.accuracy(with_deltas(evaluate.load_encoder(zoo / "base"), ideal), task),
                    "excess": excess(loaded.deltas, wanted, bests, rank),
                }
                rows.append(row)
                print(
                    f"{task:10}{rank:5}{row['accuracy']:8.1%}{row['table']:8.1%}"
                    f"{100 * (row['accuracy'] - row['table']):+10.1f} pts{row['best']:11.1%}{row['excess']:14.3%}"
                )
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1))


if __name__ == "__main__":
    main()
