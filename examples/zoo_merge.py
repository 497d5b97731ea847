"""How good real fine-tunes are after a merge: every method, every space, judged by normalised accuracy.

    python examples/zoo_merge.py ZOO [--models roletail,next,half] [--adapters all] [--methods ties,tsv_m]
        [--spaces full,core] [--limit 100] [--split test] [--work DIR] [--json OUT]

ZOO (or the environment variable LRMERGE_ZOO) is the folder that zoo_extract.py speaks of. Full fine-tunes and LoRAs
are merged by recipes through the public API, written, loaded by transformers, and judged under each task's own head:
accuracy over that of the task's own fine-tune. Beside it stands the figure of the zoo's README where it has one.

Methods run with the parameters in MODELS and ADAPTERS, and others with their defaults. Where the README names a scale
it is taken; other scales were chosen once, coarsely, by --split val. Nothing is tuned on the test split.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import re
import shutil
import tempfile
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from zoo_extract import script

import mergekit_lr as lr


class Setting(NamedTuple):
    """Parameters of a method, and the name that the zoo's README has for the result."""

    parameters: Mapping[str, Any] = {}
    known_as: str = ""


class Row(NamedTuple):
    """One merge. table: the normalised average of the zoo's README, None where it has none."""

    method: str
    space: str
    parameters: Mapping[str, Any]
    table: float | None


# By method, or by method and space.
Settings = Mapping[str | tuple[str, str], Sequence[Setting]]

MODELS: Settings = {
    "linear": [Setting({}, "average 1.0")],
    "task_arithmetic": [
        Setting({"scale": 0.5}, "task arithmetic 0.5"),
        Setting({"scale": 1.0}, "task arithmetic 1.0"),
    ],
    "ties": [
        Setting({"density": 0.2, "scale": 1.0}, "TIES 1.0"),
        Setting({"density": 0.2, "scale": 2.0}, "TIES 2.0"),
    ],
    "tsv_m": [Setting({}, "TSV-M 1.0")],
    "iso_c": [Setting({"scale": 0.5}, "Iso-C 0.5"), Setting({"scale": 1.0}, "Iso-C 1.0")],
    "svd": [Setting({"rank": 64, "scale": 0.5})],
    "slerp": [Setting({"t": 0.5})],
    "breadcrumbs": [Setting({"density": 0.9, "scale": 0.5})],
    "breadcrumbs_ties": [Setting({"density": 0.9, "scale": 0.5})],
    "dare_linear": [Setting({"density": 0.5, "scale": 0.5})],
    "dare_ties": [Setting({"density": 0.5, "scale": 0.5})],
    "della": [Setting({"density": 0.5})],
    "della_linear": [Setting({"density": 0.5, "scale": 0.5})],
}
ADAPTERS: Settings = {
    "linear": [Setting({}, "average")],
    "task_arithmetic": [Setting({"weight": 0.25}, "task arithmetic")],
    "cat": [Setting({"weight": 0.25}, "task arithmetic")],
    "peft": [
        Setting({"combination": "ties", "weight": 1.0, "density": 0.2}, "PEFT `ties`"),
        Setting({"combination": "svd", "weight": 0.25, "rank": 16}, "PEFT `svd` r16"),
    ],
    "factor_average": [Setting({"weight": 0.0625}, "PEFT `linear`")],
    "svd": [Setting({"weight": 0.25, "rank": 16}, "PEFT `svd` r16")],
    ("ties", "full"): [Setting({"density": 0.2, "scale": 0.8}, "TIES")],
    ("ties", "core"): [Setting({"density": 0.2, "scale": 1.6}, "Core Space TIES")],
    ("ties", "knots"): [Setting({"density": 0.2, "scale": 0.8}, "KnOTS-TIES")],
    ("iso_c", "full"): [Setting({"support": "full", "scale": 2.0})],
    ("iso_c", "core"): [Setting({"scale": 1.0}, "Core Space Iso-C")],
    ("tsv_m", "core"): [Setting({"scale": 0.48}, "Core Space TSV")],
    "tsv_m": [Setting({"scale": 0.48})],
    "core_space": [Setting({"inner": "tsv_m", "isotropize": True})],
    "breadcrumbs": [Setting({"density": 0.9, "weight": 0.4})],
    "breadcrumbs_ties": [Setting({"density": 0.9, "weight": 0.25})],
    ("breadcrumbs_ties", "core"): [Setting({"density": 0.9, "weight": 0.4})],
    "cart": [Setting({"strength": 0.5})],
    ("cart", "full"): [Setting({"strength": 2.0})],
    "dare_linear": [Setting({"density": 0.5, "weight": 0.25})],
    "dare_ties": [Setting({"density": 0.5, "weight": 0.2})],
    "della": [Setting({"density": 0.5, "scale": 0.6})],
    "della_linear": [Setting({"density": 0.5, "weight": 0.25})],
}


def fits(method: Any, count: int, *, adapters: bool) -> bool:
    """Whether a method merges so many models, or adapters."""
    least, most = method.models
    if count < least or (most is not None and count > most):
        return False
    if not adapters:
        return method.takes != "factors"
    return method.takes != "weights" or (method.factored and method.base != "required")


def rows(count: int, settings: Settings, table: Mapping[str, float], *, adapters: bool) -> Iterator[Row]:
    """Every method that fits, in every space where it runs."""
    for name, method in lr.methods().items():
        if not fits(method, count, adapters=adapters):
            continue
        for space in method.spaces if adapters else ["full"]:
            for given in settings.get((name, space), settings.get(name, [Setting()])):
                yield Row(name, space, given.parameters, table.get(given.known_as))


def recipe(row: Row, base: Path, inputs: Iterable[Path], *, adapters: bool) -> dict[str, Any]:
    """The recipe of a row: a model in float32, so that no rounding stands between the methods."""
    kind = "adapter" if adapters else "model"
    content = {
        "version": 1,
        "merge_method": row.method,
        "base_model": str(base),
        f"{kind}s": [{kind: str(path)} for path in inputs],
        "parameters": dict(row.parameters),
        "output": {"kind": "model", "dtype": "float32"},
    }
    return content | ({"space": row.space} if adapters else {})


@torch.inference_mode()
def accuracies(
    zoo: Path, encoder: nn.Module, tasks: Iterable[str], *, split: str = "test", limit: int | None = None
) -> dict[str, float]:
    """Task to accuracy on the first ``limit`` examples of a split, in batches of like length."""
    evaluate, found = script(zoo, "evaluate"), {}
    encoder.eval()
    for task in tasks:
        ids, lengths, types, labels = (column[:limit] for column in evaluate.load_split(task, split))
        hits = 0
        for batch in lengths.argsort(stable=True).split(64):
            features = evaluate.features(encoder, ids[batch], lengths[batch], types[batch])
            hits += int((evaluate.logits(task, features).argmax(1) == labels[batch]).sum())
        found[task] = hits / len(labels)
    return found


def normalised(zoo: Path, found: Mapping[str, float], *, adapters: bool) -> dict[str, float]:
    """Each accuracy over that of the task's own fine-tune, and their mean as "average"."""
    own = json.loads((zoo / "zoo.json").read_text())["lora" if adapters else "full"]
    shares = {task: accuracy / own[task] for task, accuracy in found.items()}
    return shares | {"average": sum(shares.values()) / len(shares)}


def standard_error(zoo: Path, tasks: Sequence[str], *, split: str, limit: int | None, adapters: bool) -> float:
    """Of a normalised average on so many examples, if merges are about as accurate as fine-tunes."""
    own = json.loads((zoo / "zoo.json").read_text())["lora" if adapters else "full"]
    count = len(script(zoo, "evaluate").load_split(tasks[0], split)[0][:limit])
    return math.sqrt(sum((1 - own[task]) / own[task] for task in tasks) / count) / len(tasks)


def reference(zoo: Path, names: Sequence[str], *, adapters: bool) -> dict[str, float]:
    """The normalised averages of the zoo's README by name, for the very models or adapters that it merged."""
    text = (zoo / "README.md").read_text()
    if adapters:
        # "... normalised average: average 80.9, PEFT `ties` 82.9, ..., Core Space TSV 88.5 (0.48)."
        found = re.search(r"^Merging all eight LoRAs.*?: (.*?)\.\n", re.sub(r" ?\([^)]*\)", "", text), re.M | re.S)
        if found is None or len(names) < 8:
            return {}
        pairs = (part.rpartition(" ") for part in " ".join(found[1].split()).split(", "))
        return {name: float(value) / 100 for name, _, value in pairs}
    merged = re.search(r"^Merging the three full fine-tunes \((.*?)\)", text, re.M)
    if merged is None or set(names) != set(merged[1].split(", ")):
        return {}
    table = {}
    for line in text[merged.end() :].splitlines():
        cells = [cell.strip() for cell in line.split("|")]
        if len(cells) == 8 and cells[2][:1].isdigit():
            table[f"{cells[1].partition(' (')[0]} {cells[2]}"] = float(cells[6]) / 100
    return table


def measured(
    zoo: Path, row: Row, inputs: Sequence[Path], *, adapters: bool, split: str = "test", limit: int | None = None
) -> dict[str, float]:
    """Normalised accuracies of one merge, under the heads of the tasks that its inputs are named after."""
    with tempfile.TemporaryDirectory() as work:
        lr.merge(recipe(row, zoo / "base", inputs, adapters=adapters), Path(work) / "out")
        encoder = script(zoo, "evaluate").load_encoder(Path(work) / "out")
    found = accuracies(zoo, encoder, [path.name for path in inputs], split=split, limit=limit)
    return normalised(zoo, found, adapters=adapters)


def finetunes(zoo: Path, tasks: Iterable[str], work: Path) -> list[Path]:
    """Folders of the full fine-tunes; the zoo's script trains those that it has no weights of, a minute each."""
    for task in tasks:
        if not (work / task).exists():
            made = script(zoo, "full").build(task, work / "unfinished")
            shutil.move(made, work / task)
    return [work / task for task in tasks]


def line(name: str, shares: Mapping[str, float], table: float | None, seconds: float) -> str:
    """One row as text, in percent."""
    figures = "".join(f"{100 * share:9.1f}" for share in shares.values())
    beside = "" if table is None else f"{100 * table:7.1f}{100 * (shares['average'] - table):+7.1f}"
    return f"{name:66}{figures}{beside:14}{seconds:6.0f} s"


def show(zoo: Path, inputs: Sequence[Path], args: argparse.Namespace, *, adapters: bool) -> Iterator[dict[str, Any]]:
    """Print the table of merges of these inputs, and give its rows."""
    tasks, settings = [path.name for path in inputs], ADAPTERS if adapters else MODELS
    wanted = args.methods.split(",") if args.methods else [*lr.methods()]
    if unknown := [name for name in wanted if name not in lr.methods()]:
        raise SystemExit(f"--methods {unknown[0]}: no such method; lrmerge methods lists them")
    spaces = args.spaces.split(",")
    left_out = [name for name in wanted if not fits(lr.methods()[name], len(inputs), adapters=adapters)]
    error = standard_error(zoo, tasks, split=args.split, limit=args.limit, adapters=adapters)
    kind = "LoRAs" if adapters else "full fine-tunes"
    print(f"\n{len(inputs)} {kind}, normalised accuracy in %; standard error of an average {100 * error:.1f}")
    print(f"not for {len(inputs)} of them: {', '.join(left_out) or 'none'}")
    print(f"{'':66}{''.join(f'{task:>9}' for task in [*tasks, 'average'])}{'table':>7}{'diff':>7}")
    alone = json.loads((zoo / "zoo.json").read_text())["base"]
    print(line("the base alone", normalised(zoo, {t: alone[t] for t in tasks}, adapters=adapters), None, 0))
    for row in rows(len(inputs), settings, reference(zoo, tasks, adapters=adapters), adapters=adapters):
        if row.method not in wanted or row.space not in spaces:
            continue
        started = time.perf_counter()
        shares = measured(zoo, row, inputs, adapters=adapters, split=args.split, limit=args.limit)
        given = ", ".join(f"{key}={value}" for key, value in row.parameters.items())
        name = f"{row.method}{f' in {row.space}' if row.space != 'full' else ''}{f' ({given})' if given else ''}"
        print(line(name, shares, row.table, time.perf_counter() - started), flush=True)
        yield {"inputs": "adapters" if adapters else "models", **row._asdict(), "normalised": shares}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("zoo", type=Path, nargs="?", default=os.environ.get("LRMERGE_ZOO"))
    parser.add_argument("--models", default="roletail,next,half", help="tasks of the full fine-tunes, or none")
    parser.add_argument("--adapters", default="all", help="tasks of the LoRAs, or none")
    parser.add_argument("--methods", help="default: all that fit")
    parser.add_argument("--spaces", default="full,core,knots", help="for LoRAs")
    parser.add_argument("--limit", type=int, help="examples of each task; default: all")
    parser.add_argument("--split", default="test", choices=["test", "val"])
    parser.add_argument("--work", type=Path, help="keep the full fine-tunes here for another run")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    if args.zoo is None:
        parser.error("give the zoo's folder, or set LRMERGE_ZOO")
    zoo, found = Path(args.zoo).resolve(), []
    with tempfile.TemporaryDirectory() as scratch:
        if args.models != "none":
            inputs = finetunes(zoo, args.models.split(","), args.work or Path(scratch))
            found += show(zoo, inputs, args, adapters=False)
        if args.adapters != "none":
            everything = json.loads((zoo / "zoo.json").read_text())["tasks"]
            chosen = everything if args.adapters == "all" else args.adapters.split(",")
            found += show(zoo, [zoo / "lora" / task for task in chosen], args, adapters=True)
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
