"""Adapters baked into a base: time against copying the files and against PEFT, and a run in very little memory.

    python benchmarks/apply.py --size 1GB --repeat 3
    python benchmarks/apply.py --memory-limit 1GiB --size 4GiB

A Llama-shaped checkpoint of `--size` (hidden 2048, bfloat16, a shard per GB, a table of 128k rows) and a LoRA of
`--rank` on every linear layer are made first and kept in `--workdir`. Then, each a fresh process on one core:

    lrmerge   lrmerge apply BASE ADAPTER
    PEFT      from_pretrained, merge_and_unload, save_pretrained, in bfloat16; left out with --no-peers
    copy      what no such work can avoid: read every file and write it

CPU is user + system time, the write-back of the kernel not in it.

--memory-limit B runs lrmerge alone with `--memory B` under the kernel's hard limit of B for the whole process (a
memory control group: the page cache counts in it, but is given back under pressure). The result is then compared
with dense sums, row by row. `--workdir` must be on a disk, not in memory.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from pathlib import Path

import torch
from extract import Run, _entering, _make_group, measure
from safetensors import safe_open
from safetensors.torch import save_file

from mergekit_lr.checkpoint.shards import cut_at
from mergekit_lr.checkpoint.writer import SafetensorsWriter, total_bytes
from mergekit_lr.graph.resources import parse_size

HIDDEN, INNER, ROWS = 2048, 5632, 128_000
SHARD = 10**9

PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.bfloat16)
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
COPY = """
import shutil, sys
from pathlib import Path
Path(sys.argv[3]).mkdir()
for file in Path(sys.argv[1]).glob("*.safetensors"):
    with file.open("rb") as source, (Path(sys.argv[3]) / file.name).open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 24)
"""


def linear(layer: int) -> dict[str, tuple[int, int]]:
    """The seven linear weights of a layer, (d_out, d_in)."""
    at = f"model.layers.{layer}."
    shapes = {f"{at}self_attn.{p}_proj.weight": (HIDDEN, HIDDEN) for p in "qkvo"}
    shapes |= {f"{at}mlp.{p}_proj.weight": (INNER, HIDDEN) for p in ("gate", "up")}
    return shapes | {f"{at}mlp.down_proj.weight": (HIDDEN, INNER)}


def make(folder: Path, size: int, rank: int) -> None:
    """A base of about ``size`` bytes and its adapter, unless they are there."""
    if folder.exists():
        return
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (ROWS, HIDDEN), "model.norm.weight": (HIDDEN,)}
    layers = 0
    while total_bytes((torch.bfloat16, shape) for shape in shapes.values()) < size:
        shapes |= linear(layers)
        shapes |= {f"model.layers.{layers}.{n}_layernorm.weight": (HIDDEN,) for n in ("input", "post_attention")}
        layers += 1
    partial = folder.with_suffix(".partial")
    shutil.rmtree(partial, ignore_errors=True)
    (partial / "base").mkdir(parents=True)
    files = cut_at({"model.safetensors": {name: (torch.bfloat16, shape) for name, shape in shapes.items()}}, SHARD)
    pattern = (0.02 * torch.randn(1 << 20, generator=torch.Generator().manual_seed(0))).bfloat16()
    for file, held in files.items():
        with SafetensorsWriter(partial / "base" / file, held) as writer:
            for name, (_, shape) in held.items():
                count = torch.Size(shape).numel()
                writer.write(name, pattern.repeat(-(-count // len(pattern)))[:count].view(shape))
    index = {"metadata": {}, "weight_map": {name: file for file, held in files.items() for name in held}}
    (partial / "base" / "model.safetensors.index.json").write_text(json.dumps(index))
    (partial / "base" / "config.json").write_text(json.dumps(config(layers)))
    (partial / "adapter").mkdir()
    generator, tensors = torch.Generator().manual_seed(1), {}
    for name, (rows, columns) in (item for layer in range(layers) for item in linear(layer).items()):
        key = f"base_model.model.{name.removesuffix('.weight')}"
        tensors[f"{key}.lora_A.weight"] = torch.randn(rank, columns, generator=generator) / columns**0.5
        tensors[f"{key}.lora_B.weight"] = 0.02 * torch.randn(rows, rank, generator=generator)
    save_file(tensors, partial / "adapter" / "adapter_model.safetensors")
    targets = [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")]
    settings = {"peft_type": "LORA", "r": rank, "lora_alpha": rank, "target_modules": targets, "task_type": "CAUSAL_LM"}
    (partial / "adapter" / "adapter_config.json").write_text(json.dumps(settings))
    partial.rename(folder)


def config(layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": HIDDEN,
        "intermediate_size": INNER,
        "num_hidden_layers": layers,
        "num_attention_heads": 16,
        "num_key_value_heads": 16,
        "vocab_size": ROWS,
        "tie_word_embeddings": True,
        "dtype": "bfloat16",
    }


def ours(folder: Path, out: Path, *more: str) -> list[str]:
    start = [sys.executable, "-m", "lrmerge", "apply", str(folder / "base"), str(folder / "adapter"), "-o", str(out)]
    return [*start, "--threads", "1", "--device", "cpu", "-q", *more]


def script(text: str, folder: Path, out: Path) -> list[str]:
    return [sys.executable, "-c", text, str(folder / "base"), str(folder / "adapter"), str(out)]


def worst_rounding(folder: Path, out: Path) -> float:
    """The largest distance of an entry from the float64 sum, in bfloat16's spacing at the larger of sum and base.

    0.5 is one rounding. Where sum and base cancel, the sum's own spacing is finer than the float32 of the arithmetic.
    """
    worst = 0.0
    with safe_open(folder / "adapter" / "adapter_model.safetensors", "pt") as factors:
        adapted = set(factors.keys())
        for file in sorted((folder / "base").glob("*.safetensors")):
            with safe_open(file, "pt") as before, safe_open(out / file.name, "pt") as after:
                for name in before.keys():  # noqa: SIM118 (no mapping)
                    key = f"base_model.model.{name.removesuffix('.weight')}.lora_"
                    old, new = before.get_slice(name), after.get_slice(name)
                    if f"{key}A.weight" not in adapted:
                        if not torch.equal(before.get_tensor(name), after.get_tensor(name)):
                            raise SystemExit(f"{name}: not the base's, although no adapter touches it")
                        continue
                    first, second = factors.get_tensor(f"{key}A.weight"), factors.get_tensor(f"{key}B.weight")
                    rows = torch.arange(0, second.shape[0], 97)
                    base = torch.stack([old[int(i)] for i in rows]).double()
                    exact = base + second[rows].double() @ first.double()
                    spacing = 2.0 ** (torch.maximum(exact.abs(), base.abs()).log2().floor() - 7)
                    found = torch.stack([new[int(i)] for i in rows]).double()
                    worst = max(worst, float(((found - exact).abs() / spacing).max()))
    return worst


def limited(folder: Path, limit: str) -> dict:
    """One run under the kernel's hard limit, and whether its numbers are right."""
    out, size = folder / "out-limited", parse_size(limit)
    shutil.rmtree(out, ignore_errors=True)
    group = _make_group(size)
    if group is None:
        print("no memory control group can be made here: RLIMIT_DATA limits anonymous memory instead")
    try:
        run = measure(ours(folder, out, "--memory", limit), 1, folder / "limited.log", enter=_entering(group, size))
        peak = int((group / "memory.max_usage_in_bytes").read_text()) if group else run.anonymous
    finally:
        if group:
            group.rmdir()
    total = sum(file.stat().st_size for file in out.glob("*.safetensors"))
    worst = worst_rounding(folder, out)
    print(
        f"{total / 1e9:.2f} GB under a hard limit of {size / 1e6:.0f} MB: done in {run.wall:.1f} s "
        f"({run.cpu:.1f} s CPU), anonymous peak {run.anonymous / 1e6:.0f} MB, worst entry {worst:.4f} units in the "
        "last place from the exact sum"
    )
    return {"limit": size, "bytes": total, "charged": peak, "worst_ulp": worst, **run._asdict()}


def compare(folder: Path, args: argparse.Namespace) -> dict:
    """Medians of interleaved runs."""
    outs = {name: folder / f"out-{name}" for name in ("lrmerge", "PEFT", "copy")}
    commands = {"lrmerge": ours(folder, outs["lrmerge"]), "copy": script(COPY, folder, outs["copy"])}
    if args.peers:
        commands["PEFT"] = script(PEFT, folder, outs["PEFT"])
    runs: dict[str, list[Run]] = {name: [] for name in commands}
    for _ in range(args.repeat):
        for name, command in commands.items():
            shutil.rmtree(outs[name], ignore_errors=True)
            runs[name].append(measure(command, 1, folder / f"{name}.log"))
    medians = {name: Run(*(statistics.median(c) for c in zip(*all_, strict=True))) for name, all_ in runs.items()}
    one = medians["lrmerge"]
    print(f"{'':9}{'wall s':>16}{'CPU s':>16}{'RSS MB':>16}{'anonymous MB':>16}")
    for name, row in medians.items():
        cells = zip(row, one, (1, 1, 1e6, 1e6), (2, 2, 0, 0), strict=True)
        print(f"{name:9}" + "".join(f"{v / unit:9.{d}f} {v / max(o, 1e-9):5.2f}x" for v, o, unit, d in cells))
    return {name: row._asdict() for name, row in medians.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", type=parse_size, default=10**9, help="of the base [1GB]")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--repeat", type=int, default=3)
    parser.add_argument("--peers", action=argparse.BooleanOptionalAction, default=True)
    parser.add_argument("--memory-limit", metavar="SIZE", help="such as 1GiB: see above")
    parser.add_argument("--workdir", type=Path, help="where the models are kept (default: a temporary folder)")
    parser.add_argument("--json", type=Path, help="write every figure to this file")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        workdir = args.workdir or Path(temporary)
        workdir.mkdir(parents=True, exist_ok=True)
        folder = workdir.resolve() / f"llama-{args.size}-rank-{args.rank}"
        make(folder, args.size, args.rank)
        result = limited(folder, args.memory_limit) if args.memory_limit else compare(folder, args)
    if args.json:
        args.json.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
