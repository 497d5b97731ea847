"""Whole models merged from disk to disk, by lrmerge and mergekit and against copying. See merge.py."""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any, NamedTuple

import torch
import yaml
from extract import Run, measure
from safetensors import safe_open
from torch import Tensor

import mergekit_lr as lr
from mergekit_lr.checkpoint.shards import cut_at
from mergekit_lr.checkpoint.writer import SafetensorsWriter
from mergekit_lr.methods.delta import as_dense

METHODS = ("linear", "slerp", "ties", "dare_ties")
WEIGHTS = (0.5, 0.34137, 0.22939)  # with them no sum of coarse bfloat16 deltas is 0 but for rounding
DENSITY = 0.5
T = 0.4  # of slerp
SAMPLED = 4  # tensors whose error is measured
INNER = 11 / 4  # of the MLP's width, over the hidden width

COPY = """
import os, sys
from pathlib import Path
*models, out, whole = sys.argv[1:]
out = Path(out)
out.mkdir()
buffer = bytearray(1 << 18)
for number, model in enumerate(models):
    for file in sorted(Path(model).glob("*.safetensors")):
        with file.open("rb", buffering=0) as source:
            if whole != "all" and number:
                while source.readinto(buffer):
                    pass
                continue
            with (out / f"{number}-{file.name}").open("wb") as target:
                at, size = 0, file.stat().st_size
                while at < size:
                    at += os.sendfile(target.fileno(), source.fileno(), at, 1 << 24)
                os.fsync(target.fileno())
"""


class Models(NamedTuple):
    """A base and its fine-tunes, each a folder."""

    base: Path
    tuned: list[Path]

    def used(self, method: str) -> list[Path]:
        """The inputs of a method; slerp takes two."""
        if method == "slerp":
            return self.tuned[:2]
        return self.tuned if method == "linear" else [self.base, *self.tuned]


def make_models(folder: Path, args: argparse.Namespace) -> Models:
    """The models of that size, made when they are not there yet: normal weights and some noise."""
    models = Models(folder / "base", [folder / f"tuned-{i}" for i in range(args.models)])
    if folder.exists():
        return models
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    shapes = _shapes(args.hidden, args.layers, args.vocabulary)
    whole = {name: (torch.bfloat16, shape) for name, shape in shapes.items()}
    files = cut_at({"model.safetensors": whole}, args.shard_size)
    pattern = 0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))
    for number, model in enumerate((models.base, *models.tuned)):
        place = partial / model.name
        place.mkdir(parents=True)
        own = pattern if number == 0 else pattern + _noise(number)
        for file, held in files.items():
            with SafetensorsWriter(place / file, held) as writer:
                for at, (name, (_, shape)) in enumerate(held.items()):
                    count = torch.Size(shape).numel()
                    cycle = own.roll(at * 1009).bfloat16()
                    writer.write(name, cycle.repeat(-(-count // len(cycle)))[:count].view(shape))
        index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
        (place / "model.safetensors.index.json").write_text(json.dumps(index))
        (place / "config.json").write_text(json.dumps(_config(args)))
    partial.rename(folder)
    return models


def _noise(seed: int) -> Tensor:
    """Every second number is large, the others are small: what trimming to one half keeps is no matter of rounding."""
    z = torch.randn(1 << 20, generator=torch.Generator().manual_seed(seed))
    large = torch.arange(1 << 20) % 2 == 0
    return torch.where(large, z.sign() * (0.002 + 0.001 * z.abs()), 1e-4 * z.clamp(-3, 3))


def _shapes(hidden: int, layers: int, vocabulary: int) -> dict[str, tuple[int, ...]]:
    inner = int(hidden * INNER)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (vocabulary, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{at}mlp.{name}_proj.weight": (inner, hidden) for name in ("gate", "up")}
        shapes[f"{at}mlp.down_proj.weight"] = (hidden, inner)
        shapes |= {f"{at}{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (vocabulary, hidden)}


def _config(args: argparse.Namespace) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": args.hidden,
        "intermediate_size": int(args.hidden * INNER),
        "num_hidden_layers": args.layers,
        "num_attention_heads": max(1, args.hidden // 64),
        "num_key_value_heads": max(1, args.hidden // 64),
        "vocab_size": args.vocabulary,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }


def weights_of(count: int) -> list[float]:
    """Unequal weights of that many models."""
    return [WEIGHTS[i % len(WEIGHTS)] for i in range(count)]


def recipe(method: str, models: Models) -> dict[str, Any]:
    """A recipe that mergekit and lrmerge read alike."""
    entries: list[dict[str, Any]] = [{"model": str(path)} for path in models.tuned]
    document: dict[str, Any] = {"merge_method": method, "dtype": "bfloat16"}
    if method == "slerp":
        return document | {
            "base_model": str(models.tuned[0]), "models": entries[:2], "parameters": {"t": T},
        }  # fmt: skip
    for entry, weight in zip(entries, weights_of(len(entries)), strict=True):
        entry["parameters"] = {"weight": weight} | ({} if method == "linear" else {"density": DENSITY})
    document["models"] = entries
    if method == "linear":
        return document
    return document | {"base_model": str(models.base), "parameters": {"normalize": True}}


def exact(method: str, name: str, inputs: list[Tensor]) -> Tensor:
    """The merged tensor in float64. The base is the first input of ties and dare_ties."""
    wide = [tensor.double() for tensor in inputs]
    if method == "linear":
        weights = weights_of(len(wide))
        return sum((w * x for w, x in zip(weights, wide, strict=True)), torch.zeros_like(wide[0])) / sum(weights)
    if method == "slerp":
        a, b = wide
        angle = torch.acos((a / a.norm() * (b / b.norm())).sum())
        return (((1 - T) * angle).sin() * a + (T * angle).sin() * b) / angle.sin()
    base, *tuned = wide
    weights = weights_of(len(tuned))
    if method == "dare_ties":
        options = {"weights": weights, "density": DENSITY, "base": base, "name_of_tensor": name, "normalize": True}
        options["compat"] = "mergekit"  # as in a recipe of its kind
        return as_dense(lr.merge_tensors("dare_ties", tuned, **options))
    parts = []
    for weight, tensor in zip(weights, tuned, strict=True):
        delta = tensor - base
        dropped = delta.numel() - int(DENSITY * delta.numel())
        least = delta.abs().flatten().kthvalue(dropped).values
        parts.append(weight * delta * (delta.abs() > least))
    stack = torch.stack(parts)
    agrees = (stack.sign() == stack.sum(0).sign()) & (stack != 0)
    share = (torch.tensor(weights, dtype=torch.float64).view(-1, *[1] * base.ndim) * agrees).sum(0)
    return base + (stack * agrees).sum(0) / share.where(share > 0, 1)


def errors(method: str, used: list[Path], out: Path) -> tuple[float, float]:
    """(relative error on sampled matrices, what rounding the exact ones to bfloat16 costs)."""
    names = json.loads((used[0] / "model.safetensors.index.json").read_text())["weight_map"]
    matrices = [name for name in names if "_proj" in name]
    far = lost = size = 0.0
    for name in matrices[:: max(1, len(matrices) // SAMPLED)][:SAMPLED]:
        wanted = exact(method, name, [_tensor(model, name) for model in used])
        far += float((_tensor(out, name).double() - wanted).square().sum())
        lost += float((wanted.bfloat16().double() - wanted).square().sum())
        size += float(wanted.square().sum())
    return (far / size) ** 0.5, (lost / size) ** 0.5


def _tensor(model: Path, name: str) -> Tensor:
    index = model / "model.safetensors.index.json"
    file = json.loads(index.read_text())["weight_map"][name] if index.exists() else "model.safetensors"
    with safe_open(model / file, "pt") as held:
        return held.get_tensor(name)


def compare(method: str, models: Models, folder: Path, args: argparse.Namespace) -> dict:
    """Medians of alternating runs of the programs for one method."""
    out = {name: folder / f"out-{name}" for name in ("lrmerge", "mergekit", "floor", "copy")}
    written = folder / f"{method}.yaml"
    written.write_text(yaml.safe_dump(recipe(method, models)))
    used = models.used(method)
    start = [sys.executable, "-m", "lrmerge", "merge", str(written), str(out["lrmerge"])]
    commands = {"lrmerge": [*start, "--threads", str(args.threads), "--device", "cpu", "--overwrite", "-q"]}
    if args.peers:
        peer = [args.mergekit, str(written), str(out["mergekit"]), "--no-copy-tokenizer", "--quiet"]
        commands["mergekit"] = [*peer, "-j", str(args.threads)]
    for name, kind in ("floor", "one"), ("copy", "all"):
        commands[name] = [sys.executable, "-c", COPY, *map(str, used), str(out[name]), kind]
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(args.repeat):
        for name, command in commands.items():
            shutil.rmtree(out[name], ignore_errors=True)
            if args.cold:
                os.sync()
                Path("/proc/sys/vm/drop_caches").write_text("3")
            runs[name].append(measure(command, args.threads, folder / f"{name}.log"))
    row: dict = {"method": method, "threads": args.threads}
    for name, taken in runs.items():
        row[name] = Run(*(statistics.median(column) for column in zip(*taken, strict=True)))._asdict()
        if name == "lrmerge" or (name == "mergekit" and method != "dare_ties"):
            row[name]["error"], row["rounding"] = errors(method, used, out[name])
        shutil.rmtree(out[name])
    return row


def show(row: dict) -> None:
    """A line per program, its ratio to lrmerge behind each figure."""
    print(f"\n{row['method']}, {row['threads']} thread(s); rounding alone {row['rounding']:.2e}")
    print(f"{'':9}{'wall s':>16}{'CPU s':>16}{'anonymous MB':>16}{'error':>11}")
    one = row["lrmerge"]
    for name in ("lrmerge", "mergekit", "floor", "copy"):
        if name not in row:
            continue
        figures = [(row[name][key] / unit, one[key] / unit) for key, unit in (("wall", 1), ("cpu", 1))]
        figures.append((row[name]["anonymous"] / 1e6, one["anonymous"] / 1e6))
        cells = "".join(f"{value:9.2f} {value / max(mine, 1e-9):5.2f}x" for value, mine in figures)
        print(f"{name:9}{cells}" + (f"{row[name]['error']:11.2e}" if "error" in row[name] else ""), flush=True)


def files(args: argparse.Namespace) -> list[dict]:
    """Every method in turn on the same models.

    Raises:
        SystemExit: mergekit's program is not there, or a merge fails.
    """
    if args.peers and not shutil.which(args.mergekit):
        raise SystemExit(f"{args.mergekit} not found: give --mergekit PATH or --no-peers")
    with tempfile.TemporaryDirectory() as temporary:
        workdir = (args.workdir or Path(temporary)).resolve()
        workdir.mkdir(parents=True, exist_ok=True)
        sizes = (args.hidden, args.layers, args.vocabulary, args.models, args.shard_size)
        folder = workdir / "-".join(["models", *map(str, sizes)])
        models = make_models(folder, args)
        size = sum(file.stat().st_size for file in models.base.iterdir())
        print(f"{args.models} models and their base, {size / 1e6:.0f} MB each, hidden {args.hidden}")
        rows = []
        for method in args.methods:
            rows.append(compare(method, models, folder, args))
            show(rows[-1])
        return rows
