"""Spectral merging against dense SVDs: deltas of full rank, and adapters of a whole model. See merge.py."""

from __future__ import annotations

import ctypes
import math
import statistics
import threading
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import dense_routes
import torch
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.delta import as_dense

EPS = torch.finfo(torch.float32).eps
INNER = 11008 / 4096  # of the MLP's width, over the hidden width


class Cost(NamedTuple):
    """CPU seconds, and bytes of anonymous memory above what there was before."""

    seconds: float
    memory: int


class Case(NamedTuple):
    """One method on one input: the merge by lrmerge, the authors' formula in a dtype, the sum of what is merged."""

    ours: Callable[[], Any]
    dense: Callable[[torch.dtype], Tensor]
    summed: Callable[[], Tensor]


def seconds(run: Callable[[], Any]) -> float:
    """CPU seconds of a call."""
    start = time.process_time()
    run()
    return time.process_time() - start


def peak(run: Callable[[], Any], every: float = 0.005) -> tuple[Any, Cost]:
    """The result of a call, its time, and the memory it added, sampled so often; the time counts that too."""
    ctypes.CDLL(None).malloc_trim(0)  # or memory freed earlier would be used again unseen
    before, most, done = _anonymous(), 0, threading.Event()

    def sample() -> None:
        nonlocal most
        while not done.wait(every):
            most = max(most, _anonymous())

    sampler = threading.Thread(target=sample)
    sampler.start()
    start = time.process_time()
    try:
        result = run()
    finally:
        taken = time.process_time() - start
        done.set()
        sampler.join()
    return result, Cost(taken, max(most - before, 0))


def _anonymous() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))


def full_rank_deltas(hidden: int, tasks: int, spectrum: str, seed: int = 0) -> list[Tensor]:
    """T deltas (hidden, hidden) of full rank, float32.

    power: singular values i^-0.5. finetune: a head of rank 32, a tail as i^-0.7 over a quarter of the directions, 3%
    of a weight in norm, and the rounding of both weights to bfloat16.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    i = torch.arange(1, hidden + 1)
    deltas = []
    for _ in range(tasks):
        if spectrum == "power":
            left, right = torch.linalg.qr(normal(hidden, hidden)).Q, torch.linalg.qr(normal(hidden, hidden)).Q
            deltas.append((left * i**-0.5) @ right)
            continue
        weight = (0.02 * normal(hidden, hidden)).bfloat16().float()
        k = hidden // 4
        level = i[:k] ** -0.7
        level[:32] *= 3
        delta = (normal(hidden, k) * level) @ normal(k, hidden)
        deltas.append((weight + delta.mul_(0.03 * weight.norm() / delta.norm())).bfloat16().float() - weight)
    return deltas


def adapters(rows: int, columns: int, tasks: int, rank: int, seed: int = 0) -> list[LowRank]:
    """T adapters of one module, float32, alpha = 2 r."""
    generator = torch.Generator().manual_seed(seed)
    return [
        LowRank(
            torch.randn(rank, columns, generator=generator) / columns**0.5,
            torch.randn(rows, rank, generator=generator) / rows**0.5,
            2.0,
        )
        for _ in range(tasks)
    ]


def cases(hidden: int, tasks: int, spectrum: str, rank: int) -> dict[str, Case]:
    """What is compared at this size. Iso-C, Iso-CTS and TSV merge full deltas, KnOTS and Core Space adapters."""
    deltas = full_rank_deltas(hidden, tasks, spectrum)
    factors = adapters(hidden, hidden, tasks, rank)

    def merged(name: str, inputs: Sequence[Any], **options: Any) -> Callable[[], Any]:
        return lambda: lr.merge_tensors(name, inputs, **options)

    def of_deltas(formula: Callable[[Sequence[Tensor]], Tensor]) -> Callable[[torch.dtype], Tensor]:
        return lambda dtype: formula([delta.to(dtype) for delta in deltas])

    def of_factors(dtype: torch.dtype) -> list[Tensor]:
        return [factor.to(dtype).dense() for factor in factors]

    def core(dtype: torch.dtype) -> Tensor:
        folded = [factor.to(dtype).folded() for factor in factors]
        return dense_routes.core_space([f.B for f in folded], [f.A for f in folded], dense_routes.ties)

    def sum_of_deltas() -> Tensor:
        return dense_routes.total(deltas)

    def sum_of_factors() -> Tensor:
        return dense_routes.total(of_factors(torch.float64))

    return {
        "iso_c": Case(merged("iso_c", deltas, support="range_full_mean"), of_deltas(dense_routes.iso_c), sum_of_deltas),
        "iso_cts": Case(merged("iso_cts", deltas), of_deltas(dense_routes.iso_cts), sum_of_deltas),
        "tsv_m": Case(merged("tsv_m", deltas), of_deltas(dense_routes.tsv_m), sum_of_deltas),
        "knots": Case(
            merged("ties", factors, space="knots", density=0.2),
            lambda dtype: dense_routes.knots(of_factors(dtype), dense_routes.ties),
            sum_of_factors,
        ),
        "core_space": Case(merged("ties", factors, space="core", density=0.2), core, sum_of_factors),
    }


def spectral(hidden: int, args: Any) -> list[dict]:
    """A row per method and spectrum: medians of alternating runs, and errors against the formula in float64.

    With no repeats there is one run, timed while its memory is sampled; without the formula in float64, which takes
    twice as long, the error of the dense route is not known, and ours is the distance to it.
    """
    rows = []
    for spectrum in args.spectra:
        for name, case in cases(hidden, args.tasks, spectrum, args.rank).items():
            if name not in args.methods or (name in ("knots", "core_space") and spectrum != args.spectra[0]):
                continue
            runs = {"ours": case.ours, "dense": lambda case=case: case.dense(torch.float32)}
            held = {route: peak(run, 0.005 if args.repeat else 0.05) for route, run in runs.items()}
            times = {route: [] if args.repeat else [cost.seconds] for route, (_, cost) in held.items()}
            for _ in range(args.repeat):
                for route, run in runs.items():
                    times[route].append(seconds(run))
            row: dict = {"hidden": hidden, "tasks": args.tasks, "method": name}
            row["input"] = f"rank {args.rank}" if name in ("knots", "core_space") else spectrum
            for route, taken in times.items():
                row[route] = held[route][1]._replace(seconds=statistics.median(taken))._asdict()
            if args.exact:
                exact = case.dense(torch.float64)
                for route, (result, _) in held.items():
                    row[route]["error"] = error(as_dense(result), exact, case.summed())
            else:
                ours, dense = (as_dense(held[route][0]) for route in runs)
                row["ours"]["error"] = float((ours - dense).norm() / dense.norm())
            rows.append(row)
            show_spectral(row)
    return rows


def error(found: Tensor, exact: Tensor, summed: Tensor) -> float:
    """||found - exact|| / ||exact|| on those right singular vectors of the summed input that float32 knows.

    Iso-C as published lifts every other direction to the common level as well, which is no property of the input; the
    method leaves them out. At the border both are free, hence the 2.
    """
    _, S, Vh = torch.linalg.svd(summed.double(), full_matrices=False)
    right = Vh[S > 2 * max(exact.shape) * EPS * S[0]].T
    return float(((found.double() - exact) @ right).norm() / exact.norm())


def show_spectral(row: dict) -> None:
    """One line of the table."""
    one, other = row["ours"], row["dense"]
    errors = f"{one['error']:11.1e}" + (f" {other['error']:11.1e}" if "error" in other else "")
    print(
        f"{row['hidden']:6} {row['method']:>10} {row['input']:>9} {one['seconds']:9.3f} {other['seconds']:9.3f} "
        f"{other['seconds'] / one['seconds']:7.2f}x {one['memory'] / 1e6:9.0f} {other['memory'] / 1e6:9.0f} {errors}",
        flush=True,
    )


def modules(hidden: int) -> dict[tuple[int, int], int]:
    """The shapes (d_out, d_in) of a layer's seven modules, and how many of each."""
    inner = round(hidden * INNER)
    return {(hidden, hidden): 4, (inner, hidden): 2, (hidden, inner): 1}


ADAPTER_METHODS: dict[str, dict[str, Any]] = {
    "core: linear": {"name": "task_arithmetic", "space": "core"},
    "core: ties": {"name": "ties", "space": "core", "density": 0.2},
    "core: iso_c": {"name": "iso_c", "space": "core"},
    "knots: ties": {"name": "ties", "space": "knots", "density": 0.2},
    "iso_c": {"name": "iso_c"},
    "tsv_m": {"name": "tsv_m"},
    "lora_lego": {"name": "lora_lego"},
}


def by_dense_svd(label: str, deltas: Sequence[Tensor], rank: int) -> Any:
    """The same from dense deltas to factors of the stack's rank: by their formula, or merged and cut by an SVD."""
    if label == "knots: ties":
        return dense_routes.knots(deltas, dense_routes.ties)
    if label.endswith("iso_c"):
        return dense_routes.iso_c(deltas)
    if label == "tsv_m":
        return dense_routes.tsv_m(deltas)
    merged = dense_routes.ties(deltas) if label == "core: ties" else dense_routes.total(deltas)
    U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    return U[:, :rank] * S[:rank], Vh[:rank]


def whole_adapters(args: Any) -> list[dict]:
    """A row per method: CPU seconds for all modules, measured, and by dense SVDs, extrapolated."""
    rows = []
    for label in (label for label in ADAPTER_METHODS if not args.methods or label in args.methods):
        options = dict(ADAPTER_METHODS[label])
        name = options.pop("name")
        row: dict = {"method": label, "ours": 0.0, "modules": 0, "memory": 0, "dense": 0.0}
        for (m, n), count in modules(args.hidden).items():
            for number in range(count * args.layers):
                factors = adapters(m, n, args.tasks, args.rank, seed=number)
                merge = partial(lr.merge_tensors, name, factors, **options)
                if number == 0:
                    row["memory"] = max(row["memory"], peak(merge)[1].memory)
                row["ours"] += seconds(merge)
            row["modules"] += count * args.layers
            if label == "lora_lego":
                continue
            d_out, d_in = m // args.shrink, n // args.shrink
            deltas = [factor.dense() for factor in adapters(d_out, d_in, args.tasks, args.rank)]
            taken = seconds(partial(by_dense_svd, label, deltas, args.tasks * args.rank))
            row["dense"] += taken * args.shrink**3 * count * args.layers
        rows.append(row)
        ratio = f"{row['dense']:12.0f} {row['dense'] / row['ours']:9.0f}x" if row["dense"] else f"{'':>12} {'':>10}"
        each = 1e3 * row["ours"] / row["modules"]
        print(f"{label:>13} {row['ours']:9.2f} {each:9.1f} {row['memory'] / 1e6:9.0f} {ratio}", flush=True)
    if not math.isfinite(sum(row["ours"] for row in rows)):
        raise SystemExit("a time is not a number")
    return rows
