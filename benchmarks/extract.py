"""Extraction against mergekit and against the floor: wall time, CPU time, memory, error, each with its ratio.

    python benchmarks/extract.py --sizes 512,1024 --threads 1,2 --mergekit PATH/bin/mergekit-extract-lora
    python benchmarks/extract.py --sizes 4096 --memory-limit 2GB

Three programs run in turn on the same pair of checkpoints (pairs.py), each a fresh process on the same cores,
files in the page cache, `--repeat` times over; the table holds medians:

    lrmerge    lrmerge extract BASE FINETUNED --rank 64
    mergekit   mergekit-extract-lora --max-rank 64, left out with --no-peers
    floor      what no extraction can avoid: start, read both files, form the delta once, multiply it twice

CPU is user + system time. RSS counts mapped file pages, anonymous memory does not. Excess is the Frobenius error
of the written adapter over the smallest one possible at that rank, per module.

mergekit gets an environment of its own:

    python3 -m venv mk && mk/bin/pip install -c constraints.txt torch mergekit==0.1.5

Its options here: absolute paths and HF_HUB_OFFLINE=1, or its model card looks for the folders on the Hub and
ends in an error, and --no-copy-tokenizer, since the pairs have none.

--memory-limit B gives lrmerge the budget `--memory B` and the kernel's hard limit of 1.2 B for the whole process
(a memory control group; the page cache counts in it, but is given back under pressure).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from pairs import INTERMEDIATE, LAYERS, Pair, excess, make_pair

from mergekit_lr.graph.resources import parse_size

GROUPS = Path("/sys/fs/cgroup")


class Run(NamedTuple):
    """One process: seconds and bytes."""

    wall: float
    cpu: float
    rss: int
    anonymous: int


def measure(command: list[str], cores: int, log: Path, *, enter: Callable[[], None] | None = None) -> Run:
    """Run a command on the first ``cores`` cores with as many threads.

    ``enter`` is called in the child before the command starts. Anonymous memory is sampled every 10 ms.

    Raises:
        SystemExit: when the command fails, with the end of what it printed.
    """
    available = sorted(os.sched_getaffinity(0))[:cores]
    if len(available) < cores:
        raise SystemExit(f"{cores} threads asked for, {len(available)} cores available")

    def prepare() -> None:
        os.sched_setaffinity(0, available)
        if enter:
            enter()

    environment = os.environ | {
        "OMP_NUM_THREADS": str(cores),
        "MKL_NUM_THREADS": str(cores),
        "HF_HUB_OFFLINE": "1",
    }
    with log.open("wb") as out:
        start = time.perf_counter()
        child = subprocess.Popen(command, stdout=out, stderr=out, env=environment, preexec_fn=prepare)
        anonymous = 0
        while (ended := os.wait4(child.pid, os.WNOHANG))[0] == 0:
            anonymous = max(anonymous, _anonymous(child.pid))
            time.sleep(0.01)
        wall = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(ended[1])
    if child.returncode:
        tail = log.read_text(errors="replace")[-2000:]
        raise SystemExit(f"{' '.join(command)}\nended with {child.returncode}:\n{tail}")
    used = ended[2]
    return Run(wall, used.ru_utime + used.ru_stime, used.ru_maxrss * 1024, anonymous)


def _anonymous(pid: int) -> int:
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):  # it ended between two samples
        return 0
    line = next((line for line in status.splitlines() if line.startswith("RssAnon")), "RssAnon: 0")
    return int(line.split()[1]) * 1024


def ours(pair: Pair, out: Path, rank: int, threads: int, device: str) -> list[str]:
    start = [sys.executable, "-m", "lrmerge", "extract", str(pair.base), str(pair.finetuned), "-o", str(out)]
    return [*start, "--rank", str(rank), "--threads", str(threads), "--device", device, "--overwrite", "-q"]


def peer(program: str, pair: Pair, out: Path, rank: int, threads: int, device: str) -> list[str]:
    command = [program, "--base-model", str(pair.base), "--model", str(pair.finetuned), "--out-path", str(out)]
    command += ["--max-rank", str(rank), "-j", str(threads), "--no-copy-tokenizer", "--quiet"]
    return command + (["--cuda"] if device == "cuda" else [])


FLOOR = """
import sys, torch
from safetensors import safe_open
base, tuned, rank, device = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
buffers = {}
from pathlib import Path
for file in sorted(Path(base).glob("*.safetensors")):
    with safe_open(file, "pt") as a, safe_open(Path(tuned) / file.name, "pt") as b:
        for key in a.keys():
            if "_proj" not in key:
                continue
            before, after = a.get_tensor(key).to(device), b.get_tensor(key).to(device)
            m, n = before.shape
            if (m, n) not in buffers:
                buffers[m, n] = [torch.empty(m, n, device=device), torch.randn(n, rank, device=device)]
            delta, sketch = buffers[m, n]
            for rows in range(0, m, 32):  # float32 delta, in cache
                part = delta[rows : rows + 32]
                part.copy_(after[rows : rows + 32]).sub_(before[rows : rows + 32].float())
            (delta @ sketch).T @ delta
if device == "cuda":
    torch.cuda.synchronize()
"""


def floor(pair: Pair, rank: int, device: str) -> list[str]:
    return [sys.executable, "-c", FLOOR, str(pair.base), str(pair.finetuned), str(rank), device]


def compare(pair: Pair, threads: int, args: argparse.Namespace) -> dict:
    """Medians of interleaved runs of the programs on one pair, and what they wrote."""
    work = pair.folder.parent
    out = {name: work / f"out-{name}" for name in ("lrmerge", "mergekit")}
    commands = {"lrmerge": ours(pair, out["lrmerge"], args.rank, threads, args.device)}
    if args.peers:
        commands["mergekit"] = peer(args.mergekit, pair, out["mergekit"], args.rank, threads, args.device)
    commands["floor"] = floor(pair, args.rank, args.device)
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(args.repeat):
        for name, command in commands.items():
            _warm(pair)
            shutil.rmtree(work / f"out-{name}", ignore_errors=True)
            runs[name].append(measure(command, threads, work / f"{name}.log"))
    figures = {}
    for name, all_runs in runs.items():
        figures[name] = Run(*(statistics.median(column) for column in zip(*all_runs, strict=True)))._asdict()
        if name in out:
            figures[name] |= {f"excess_{k}": v for k, v in excess(pair, out[name], args.rank)._asdict().items()}
            figures[name]["adapter_bytes"] = (out[name] / "adapter_model.safetensors").stat().st_size
    return {"hidden": pair.hidden, "layers": pair.layers, "threads": threads, **figures}


def _warm(pair: Pair) -> None:
    for file in (*pair.base.iterdir(), *pair.finetuned.iterdir()):
        with file.open("rb") as source:
            while source.read(1 << 24):
                pass


def show(result: dict) -> None:
    """One table: a row per program, ratios to lrmerge behind each figure."""
    print(f"\nhidden {result['hidden']}, {result['layers']} layers, {result['threads']} thread(s)")
    print(f"{'':9}{'wall s':>16}{'CPU s':>16}{'RSS MB':>16}{'anonymous MB':>16}{'excess worst / mean':>24}")
    one = result["lrmerge"]
    for name in ("lrmerge", "mergekit", "floor"):
        if name not in result:
            continue
        row = result[name]
        cells = [
            f"{row[key] / unit:9.{digits}f} {row[key] / one[key]:5.2f}x"
            for key, unit, digits in (
                ("wall", 1, 2),
                ("cpu", 1, 2),
                ("rss", 1e6, 0),
                ("anonymous", 1e6, 0),
            )
        ]
        error = f"{row['excess_worst']:12.4%} / {row['excess_mean']:.4%}" if "excess_worst" in row else ""
        print(f"{name:9}" + "".join(f"{cell:>16}" for cell in cells) + f"{error:>24}")


def limited(pair: Pair, args: argparse.Namespace) -> dict:
    """Extract under the kernel's hard limit of 1.2 times the budget."""
    budget = parse_size(args.memory_limit)
    limit = budget + budget // 5
    out = pair.folder.parent / "out-limited"
    shutil.rmtree(out, ignore_errors=True)
    command = [*ours(pair, out, args.rank, args.threads[0], args.device), "--memory", args.memory_limit]
    group = _make_group(limit)
    if group is None:
        print("no memory control group can be made here: RLIMIT_DATA limits anonymous memory instead")
    try:
        run = measure(command, args.threads[0], pair.folder.parent / "limited.log", enter=_entering(group, limit))
    finally:
        if group:
            group.rmdir()
    error = excess(pair, out, args.rank)
    print(
        f"\nhidden {pair.hidden}, {pair.layers} layers, budget {budget / 1e6:.0f} MB, hard limit {limit / 1e6:.0f} MB: "
        f"done in {run.wall:.1f} s, anonymous peak {run.anonymous / 1e6:.0f} MB "
        f"= {run.anonymous / budget:.2f} of the budget, excess {error.worst:.4%}"
    )
    kind = "cgroup" if group else "rlimit"
    return {"budget": budget, "limit": limit, "kind": kind, **run._asdict(), "excess_worst": error.worst}


def _make_group(limit: int) -> Path | None:
    """A new memory control group, version 1 or 2, or None where none can be made."""
    for parent, file in (GROUPS / "memory", "memory.limit_in_bytes"), (GROUPS, "memory.max"):
        group = parent / f"lrmerge-bench-{os.getpid()}"
        if not (parent / "cgroup.procs").exists():
            continue
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / file).exists():
            (group / file).write_text(str(limit))
            return group
        group.rmdir()
    return None


def _entering(group: Path | None, limit: int) -> Callable[[], None]:
    def enter() -> None:
        if group:
            (group / "cgroup.procs").write_text(str(os.getpid()))
        else:
            resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))

    return enter


def numbers(text: str) -> list[int]:
    return [int(part) for part in text.split(",")]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=numbers, default=[512, 1024], help=f"of {list(INTERMEDIATE)}")
    parser.add_argument("--layers", type=int, help=f"default by size: {LAYERS}")
    parser.add_argument("--threads", type=numbers, default=[1, 2])
    parser.add_argument("--rank", type=int, default=64)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--mergekit", default="mergekit-extract-lora", help="the program of its environment")
    parser.add_argument("--memory-limit", metavar="BYTES", help="such as 2GB: see above")
    parser.add_argument("--workdir", type=Path, help="where pairs are made and kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args()
    if unknown := set(args.sizes) - set(INTERMEDIATE):
        parser.error(f"--sizes: {sorted(unknown)} not among {list(INTERMEDIATE)}")
    if args.peers and not args.memory_limit and not shutil.which(args.mergekit):
        parser.error(f"{args.mergekit} not found: give --mergekit PATH or --no-peers")

    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or Path(temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        results = []
        for hidden in args.sizes:
            pair = make_pair(workdir.resolve(), hidden, args.layers or LAYERS[hidden])
            if args.memory_limit:
                results.append(limited(pair, args))
                continue
            for threads in args.threads:
                results.append(compare(pair, threads, args))
                show(results[-1])
    if args.json:
        args.json.write_text(json.dumps(results, indent=1))


if __name__ == "__main__":
    main()
