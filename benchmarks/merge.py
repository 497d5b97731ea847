"""Merging against mergekit, against the time of copying files, and against the published formulas by dense SVDs.

    python benchmarks/merge.py files --mergekit PATH/bin/mergekit-yaml --hidden 1024 --layers 8
    python benchmarks/merge.py spectral --sizes 1024,2048
    python benchmarks/merge.py adapters

files: Llama-shaped models, bfloat16, sharded, are made on the fly (merge_files.py) and merged by linear, slerp, ties
    and dare_ties. Each run is a fresh process; runs alternate, the table holds medians:

        lrmerge    lrmerge merge RECIPE OUT
        mergekit   mergekit-yaml RECIPE OUT with the same recipe, left out with --no-peers
        floor      read every input file, write as many bytes as the result has
        copy       copy every input file (by sendfile, as fast as cp)

    All that is written is on the disk in the end (fsync). The inputs are in memory if they fit there; with --cold,
    which root alone may do, nothing is at the beginning of a run.

    CPU is user + system time. Memory is the peak of the process's anonymous memory (RssAnon). Error is the Frobenius
    distance from the float64 formula, relative to it, on sampled tensors; "rounding" is what bfloat16 alone costs.
    dare_ties draws: its error is that of lrmerge alone, against its own masks in float64. mergekit gets an
    environment of its own: python3 -m venv mk && mk/bin/pip install mergekit.

spectral: in one process, runs alternate, medians of CPU seconds; memory, what a call adds at its peak, is sampled in a
    run of its own. The dense route is the authors' (dense_routes.py) in float32, on the same deltas of full rank; KnOTS
    and Core Space merge adapters by TIES. Errors are against the same formula in float64, on the directions that
    float32 tells from rounding; with --no-exact ours is the distance to the dense route. --repeat 0 times one run.

adapters: adapters of a 7B-shaped model, module by module. The dense way multiplies the deltas out: formula and dense
    SVD for Iso-C, TSV and KnOTS, for the others the merged delta and one SVD back to factors. It is measured on one
    module of each shape, with both sides divided by --shrink, and extrapolated with the cube of that: an SVD's time
    grows no slower. LoRA-LEGO has no dense way.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path

import torch
from merge_files import METHODS, files
from merge_spectral import ADAPTER_METHODS, spectral, whole_adapters

from mergekit_lr.graph.resources import parse_size

SPECTRAL = ("iso_c", "iso_cts", "tsv_m", "knots", "core_space")


def parser() -> argparse.ArgumentParser:
    """The three commands and their options."""
    whole = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = whole.add_subparsers(dest="command", required=True)
    shared = argparse.ArgumentParser(add_help=False)
    shared.add_argument("--threads", type=int, default=1, help="[%(default)s]")
    shared.add_argument("--repeat", type=int, default=3, help="[%(default)s]")
    shared.add_argument("--json", type=Path, help="write every figure to this file")

    one = commands.add_parser("files", parents=[shared], help="whole models, on the disk")
    one.add_argument("--methods", type=_words, default=list(METHODS), help=f"of {','.join(METHODS)}")
    one.add_argument("--hidden", type=int, default=1024, help="[%(default)s]")
    one.add_argument("--layers", type=int, default=8, help="[%(default)s]")
    one.add_argument("--vocabulary", type=int, default=32_000, help="[%(default)s]")
    one.add_argument("--models", type=int, default=3, help="merged, beside the base [%(default)s]")
    one.add_argument("--shard-size", type=parse_size, default=200 * 10**6, help="of the inputs [200MB]")
    one.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    one.add_argument("--mergekit", default="mergekit-yaml", help="the program of its environment")
    one.add_argument("--cold", action="store_true", help="forget what files hold before each run (Linux, root)")
    one.add_argument("--workdir", type=Path, help="where models are made and kept (default: a temporary folder)")
    one.set_defaults(run=files)

    two = commands.add_parser("spectral", parents=[shared], help="deltas of full rank, in memory")
    two.add_argument("--methods", type=_words, default=list(SPECTRAL), help=f"of {','.join(SPECTRAL)}")
    two.add_argument("--sizes", type=lambda text: [int(part) for part in _words(text)], default=[1024])
    two.add_argument("--tasks", type=int, default=8, help="[%(default)s]")
    two.add_argument("--rank", type=int, default=16, help="of adapters [%(default)s]")
    two.add_argument("--spectra", type=_words, default=["power", "finetune"], help="of power,finetune")
    two.add_argument("--exact", action=argparse.BooleanOptionalAction, default=True, help="errors against float64")
    two.set_defaults(run=_spectral)

    three = commands.add_parser("adapters", parents=[shared], help="adapters of a whole model, in memory")
    three.add_argument("--methods", type=_words, default=[], help=f"of {','.join(ADAPTER_METHODS)}")
    three.add_argument("--hidden", type=int, default=4096, help="[%(default)s]")
    three.add_argument("--layers", type=int, default=32, help="[%(default)s]")
    three.add_argument("--tasks", type=int, default=8, help="[%(default)s]")
    three.add_argument("--rank", type=int, default=16, help="[%(default)s]")
    three.add_argument("--shrink", type=int, default=4, help="of the dense way's sides [%(default)s]")
    three.set_defaults(run=_adapters)
    return whole


def _spectral(args: argparse.Namespace) -> list[dict]:
    print(f"{args.tasks} tasks, {args.threads} thread(s); CPU seconds, MB, ", end="")
    print("error against float64" if args.exact else "distance to the dense route")
    print(f"{'hidden':>6} {'method':>10} {'input':>9} {'lrmerge s':>9} {'dense s':>9} {'ratio':>8}", end="")
    print(f" {'MB':>9} {'dense MB':>9} {'error':>11} {'dense error':>11}")
    return [row for hidden in args.sizes for row in spectral(hidden, args)]


def _adapters(args: argparse.Namespace) -> list[dict]:
    print(f"{args.tasks} adapters of rank {args.rank}, hidden {args.hidden}, {args.layers} layers, ", end="")
    print(f"{args.threads} thread(s); the dense way from sides divided by {args.shrink}, times {args.shrink**3}")
    print(f"{'method':>13} {'CPU s':>9} {'ms each':>9} {'MB':>9} {'dense s':>12} {'ratio':>10}")
    return whole_adapters(args)


def _words(text: str) -> list[str]:
    return [part.strip() for part in text.split(",")]


def main() -> None:
    args = parser().parse_args()
    torch.set_num_threads(args.threads)
    rows = args.run(args)
    if args.json:
        args.json.write_text(json.dumps(rows, indent=1) + "\n")


if __name__ == "__main__":
    main()
