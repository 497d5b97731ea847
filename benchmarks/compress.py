"""Compression of a whole LoRA against the dense SVD of PEFT and kohya, and against the floor.

    python benchmarks/compress.py --hidden 512 --intermediate 1376 --layers 2
    python benchmarks/compress.py --hidden 4096 --intermediate 11008 --layers 32 --threads 1,2

An adapter is made on all seven linear layers of a decoder, rank 64, bfloat16, with falling singular values. Two
comparisons follow.

Per module, one thread, factors in memory, medians; the dense SVD on one module of each shape (``--sample``), so its
time for the whole adapter is an extrapolation and says so:

    lrmerge    truncation in the factors, all modules of a shape together
    PEFT       add_weighted_adapter(combination_type="svd"): delta = scaling B A, torch.linalg.svd, B = U S, A = Vh
    kohya      resize_lora: torch.linalg.svd of up @ down, up = U S, down = Vh, in float32 as well

Excess is the Frobenius error over the least possible one, computed in float64 from the factors.

The whole adapter, each a fresh process: ``lrmerge compress`` from file to file, and the floor, a process that imports
torch, reads the same file into memory and writes as many bytes as the result has. Both are given with the start of
the process and without it. RSS counts mapped pages of the file, anonymous memory does not.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from extract import measure
from lrgpu.factored import squared_norm
from torch import Tensor

from mergekit_lr.adapter import peft
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.verbs.compress.plan import plan_compress
from mergekit_lr.verbs.compress.verb import squeeze

SCALING = 2.0
FLOOR = """
import json, sys, time
import torch
from safetensors.torch import load_file, save_file
started = time.perf_counter()
source, out, share = sys.argv[1], sys.argv[2], float(sys.argv[3])
tensors = {name: tensor.clone() for name, tensor in load_file(source).items()}
kept = {name: tensor.flatten()[: int(tensor.numel() * share)].clone() for name, tensor in tensors.items()}
save_file(kept, out)
print(json.dumps({"seconds": time.perf_counter() - started}))
"""


class Method(NamedTuple):
    """One way to compress: B (m, r), A (r, n), rank -> factors of that rank, scaling included."""

    name: str
    run: Callable[[Tensor, Tensor, int], tuple[Tensor, Tensor]]


def by_peft(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The arithmetic of PEFT's combination type "svd" for one adapter; its default, ``full_matrices=True``, would cost
    more on a matrix that is not square."""
    delta = (B.float() @ A.float()) * SCALING
    U, S, Vh = torch.linalg.svd(delta, full_matrices=False)
    return U[:, :rank] @ torch.diag(S[:rank]), Vh[:rank]


def by_kohya(B: Tensor, A: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """The arithmetic of kohya's resize: the SVD of the merged weight, the scale applied behind it."""
    U, S, Vh = torch.linalg.svd(B.float() @ A.float(), full_matrices=False)
    return (U[:, :rank] @ torch.diag(S[:rank])) * SCALING, Vh[:rank]


PEERS = (Method("PEFT", by_peft), Method("kohya", by_kohya))


def make_adapter(hidden: int, intermediate: int, layers: int, rank: int, seed: int = 0) -> Adapter:
    """A LoRA on the seven linear layers of each block: bfloat16, singular values that fall as 1 / i."""
    generator = torch.Generator().manual_seed(seed)
    shapes = {f"self_attn.{name}_proj": (hidden, hidden) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (intermediate, hidden) for name in ("gate", "up")}
    shapes["mlp.down_proj"] = (hidden, intermediate)
    falling = (1 / torch.arange(1, rank + 1)).sqrt()
    weights = {}
    for layer in range(layers):
        for module, (rows, columns) in shapes.items():
            B = torch.randn(rows, rank, generator=generator) * falling / rows**0.5
            A = torch.randn(rank, columns, generator=generator) * falling[:, None] / columns**0.5
            delta = LowRank(A.bfloat16(), B.bfloat16(), SCALING)
            weights[f"model.layers.{layer}.{module}.weight"] = AdaptedWeight(Kind.LINEAR, delta)
    return Adapter(weights, base="benchmark")


def excess(delta: LowRank, B: Tensor, A: Tensor, rank: int) -> float:
    """Error of B @ A over the least possible one at this rank, minus 1; all in float64."""
    wide = delta.to(torch.float64).folded()
    R_B, R_A = (torch.linalg.qr(factor, mode="r").R for factor in (wide.B, wide.A.mT))
    least = float(torch.linalg.svdvals(R_B @ R_A.mT)[rank:].square().sum().sqrt())
    stacked_B, stacked_A = torch.cat([wide.B, -B.double()], 1), torch.cat([wide.A, A.double()], 0)
    return float(squared_norm(stacked_B, stacked_A).clamp_min(0).sqrt()) / least - 1


def per_module(adapter: Adapter, rank: int, sample: int, repeat: int) -> list[dict]:
    """One row for each shape: seconds per module of each method, its excess, how many modules there are."""
    torch.set_num_threads(1)
    shapes: dict[tuple[int, ...], list[str]] = {}
    for name, weight in adapter.weights.items():
        shapes.setdefault(weight.delta.shape, []).append(name)
    rows = []
    for shape, names in shapes.items():
        group = Adapter({name: adapter.weights[name] for name in names})
        plan = plan_compress(group, rank=rank, dtype="float32", threads=1)
        times, done = [], {}
        for _ in range(repeat):
            started = time.perf_counter()
            done = squeeze(plan)
            times.append((time.perf_counter() - started) / len(names))
        row: dict = {"shape": shape, "modules": len(names), "lrmerge": statistics.median(times)}
        chosen = names[:sample]
        row["lrmerge excess"] = max(_excess_of(group, done, name, rank) for name in chosen)
        for peer in PEERS:
            seconds, worst = [], 0.0
            for name in chosen:
                delta = adapter.weights[name].delta
                started = time.perf_counter()
                B, A = peer.run(delta.B, delta.A, rank)
                seconds.append(time.perf_counter() - started)
                worst = max(worst, excess(delta, B, A, rank))
            row |= {peer.name: statistics.median(seconds), f"{peer.name} excess": worst}
        rows.append(row)
    return rows


def _excess_of(adapter: Adapter, done: dict, name: str, rank: int) -> float:
    return excess(adapter.weights[name].delta, done[name].B, done[name].A, rank)


def whole(adapter: Adapter, rank: int, threads: int, repeat: int, folder: Path) -> dict:
    """Medians over processes: seconds of ours and of the floor, with and without their start, and memory."""
    source, out, log = folder / "source", folder / "out", folder / "log"
    if not source.exists():
        source.mkdir()
        peft.save(adapter, source)
    file = source / "adapter_model.safetensors"
    share = rank / next(iter(adapter.weights.values())).delta.rank
    ours = [sys.executable, "-m", "lrmerge", "compress", str(source), "-o", str(out), "--rank", str(rank), "--json"]
    ours += ["--threads", str(threads), "--overwrite", "-q"]
    floor = [sys.executable, "-c", FLOOR, str(file), str(folder / "floor.safetensors"), str(share)]
    samples: dict[str, list[float]] = {}
    for _ in range(repeat):
        for name, command in (("floor", floor), ("lrmerge", ours)):
            taken = measure(command, threads, log)
            inner = json.loads(log.read_text()[log.read_text().index("{") :])["seconds"]
            for key, value in (
                ("process", taken.wall),
                ("inner", inner),
                ("rss", taken.rss),
                ("anon", taken.anonymous),
            ):
                samples.setdefault(f"{name} {key}", []).append(value)
    return {"bytes": file.stat().st_size} | {key: statistics.median(values) for key, values in samples.items()}


def show_modules(rows: list[dict]) -> None:
    """The table per module, and the extrapolation to the whole adapter."""
    print(f"{'shape':>14} {'modules':>7} {'lrmerge ms':>11} {'excess':>9}", end="")
    print("".join(f" {peer.name + ' ms':>11} {'ratio':>8} {'excess':>9}" for peer in PEERS))
    for row in rows:
        shape = "x".join(map(str, row["shape"]))
        print(f"{shape:>14} {row['modules']:>7} {row['lrmerge'] * 1e3:>11.2f} {row['lrmerge excess']:>9.1e}", end="")
        for peer in PEERS:
            ratio, lost = row[peer.name] / row["lrmerge"], row[f"{peer.name} excess"]
            print(f" {row[peer.name] * 1e3:>11.1f} {ratio:>7.0f}x {lost:>9.1e}", end="")
        print()
    mine = sum(row["modules"] * row["lrmerge"] for row in rows)
    count = sum(row["modules"] for row in rows)
    print(f"all {count} modules on one thread: lrmerge {mine:.2f} s measured", end="")
    for peer in PEERS:
        other = sum(row["modules"] * row[peer.name] for row in rows)
        print(f"; {peer.name} {other:.1f} s extrapolated, {other / mine:.0f}x", end="")
    print()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--intermediate", type=int, default=1376)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--from-rank", type=int, default=64)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--threads", default="1", help="cores of the whole-adapter runs, as 1,2")
    parser.add_argument("--sample", type=int, default=1, help="modules of each shape for the dense SVDs")
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    adapter = make_adapter(options.hidden, options.intermediate, options.layers, options.from_rank)
    results: dict = {"whole": {}}
    folder = Path(tempfile.mkdtemp(prefix="lrmerge-compress-"))
    try:
        for threads in map(int, options.threads.split(",")):
            row = whole(adapter, options.rank, threads, options.repeat, folder)
            results["whole"][threads] = row
            ratios = [row[f"lrmerge {key}"] / row[f"floor {key}"] for key in ("inner", "process")]
            print(
                f"whole adapter, {row['bytes'] / 1e6:.0f} MB, {threads} threads: lrmerge {row['lrmerge inner']:.2f} s, "
                f"floor {row['floor inner']:.2f} s, {ratios[0]:.2f}x; with the start of the process "
                f"{row['lrmerge process']:.2f} s and {row['floor process']:.2f} s, {ratios[1]:.2f}x; lrmerge RSS "
                f"{row['lrmerge rss'] / 1e6:.0f} MB, anonymous {row['lrmerge anon'] / 1e6:.0f} MB"
            )
    finally:
        shutil.rmtree(folder)
    results["modules"] = per_module(adapter, options.rank, options.sample, options.repeat)
    show_modules(results["modules"])
    if options.json:
        options.json.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
