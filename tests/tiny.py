"""A tiny decoder, its fine-tunes and their folders, and the command line called in this process."""

from __future__ import annotations

import contextlib
import io
import json
import os
import re
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

import planted
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

Tensors = dict[str, Tensor]
PREFIX = "base_model.model."
HIDDEN, INNER, VOCABULARY, LAYERS = 24, 40, 56, 2
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": HIDDEN,
    "intermediate_size": INNER,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": VOCABULARY,
    "tie_word_embeddings": False,
}
DOWN = "model.layers.0.mlp.down_proj.weight"
NORM = "model.norm.weight"
TABLE = "model.embed_tokens.weight"
HEAD = "lm_head.weight"


def decoder(
    *, seed: int = 0, dtype: torch.dtype = torch.float32, hidden: int = HIDDEN, layers: int = LAYERS
) -> Tensors:
    """The tensors of a small Llama under their names on disk."""
    inner, random = INNER * hidden // HIDDEN, torch.Generator().manual_seed(seed)
    shapes: dict[str, tuple[int, ...]] = {TABLE: (VOCABULARY, hidden), NORM: (hidden,), HEAD: (VOCABULARY, hidden)}
    for layer in range(layers):
        at = f"model.layers.{layer}."
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden, hidden) for p in "qo"}
        shapes |= {f"{at}self_attn.{p}_proj.weight": (hidden // 2, hidden) for p in "kv"}
        shapes |= {f"{at}mlp.{p}_proj.weight": (inner, hidden) for p in ("gate", "up")}
        shapes |= {f"{at}mlp.down_proj.weight": (hidden, inner)}
        shapes |= {f"{at}{p}_layernorm.weight": (hidden,) for p in ("input", "post_attention")}
    return {name: (torch.randn(shape, generator=random) * 0.3).to(dtype) for name, shape in shapes.items()}


def finetuned(base: Mapping[str, Tensor], *, rank: int | None = None, seed: int = 1, scale: float = 0.05) -> Tensors:
    """``base`` with every matrix changed, by a delta of ``rank`` or of full rank; vectors as they were."""
    random = torch.Generator().manual_seed(seed)

    def change(tensor: Tensor) -> Tensor:
        rows, columns = tensor.shape
        if rank is None:
            return scale * torch.randn(rows, columns, generator=random)
        left, right = (torch.randn(n, rank, generator=random) for n in (rows, columns))
        return scale * left @ right.mT

    return {n: (t.float() + change(t)).to(t.dtype) if t.dim() == 2 else t.clone() for n, t in base.items()}


def save(folder: Path, tensors: Mapping[str, Tensor], *, shards: int = 1, config: Mapping | None = CONFIG) -> Path:
    """Write a checkpoint folder of one file, or of shards with an index."""
    folder.mkdir(parents=True, exist_ok=True)
    if config is not None:
        (folder / "config.json").write_text(json.dumps(config))
    names = sorted(tensors)
    if shards == 1:
        save_file(dict(tensors), folder / "model.safetensors", metadata={"format": "pt"})
        return folder
    weight_map = {}
    for i in range(shards):
        file = f"model-{i + 1:05d}-of-{shards:05d}.safetensors"
        save_file({name: tensors[name] for name in names[i::shards]}, folder / file, metadata={"format": "pt"})
        weight_map |= dict.fromkeys(names[i::shards], file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    return folder


def factors(folder: Path) -> dict[str, Tensor]:
    """Every delta that an adapter folder holds as LoRA factors, dense in float64, by parameter."""
    config = json.loads((folder / "adapter_config.json").read_text())
    assert config["use_rslora"] is False
    tensors = load_file(folder / "adapter_model.safetensors")
    deltas = {}
    for key, a in tensors.items():
        if key.endswith(".lora_A.weight"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_A.weight")
            b = tensors[key.replace(".lora_A.", ".lora_B.")]
            deltas[f"{name}.weight"] = _scaling(config, name, a.shape[0]) * (b.double() @ a.double())
        if key.endswith(".lora_embedding_A"):
            name = key.removeprefix(PREFIX).removesuffix(".lora_embedding_A")
            b = tensors[key.replace("_A", "_B")]
            deltas[f"{name}.weight"] = _scaling(config, name, a.shape[0]) * (b.double() @ a.double()).mT
    return deltas


def _scaling(config: dict, module: str, rank: int) -> float:
    """alpha / r of a module whose rank must be the one that the configuration says."""

    def own(pattern: str, default: float) -> float:
        return next((v for key, v in config[pattern].items() if re.match(rf"(.*\.)?({key})$", module)), default)

    assert own("rank_pattern", config["r"]) == rank
    return own("alpha_pattern", config["lora_alpha"]) / rank


def saved(folder: Path) -> dict[str, Tensor]:
    """What an adapter folder holds in full, by parameter."""
    tensors = load_file(folder / "adapter_model.safetensors")
    return {key.removeprefix(PREFIX): t for key, t in tensors.items() if ".lora_" not in key}


class Outcome(NamedTuple):
    """How a command ended and what it wrote."""

    code: int
    out: str
    err: str


def lrmerge(*arguments: object, width: int = 200) -> Outcome:
    """Run the command line in this process, on a terminal of ``width`` columns."""
    from lrmerge import console
    from lrmerge.app import main

    out, err, code = io.StringIO(), io.StringIO(), 0
    argv = ["lrmerge", *map(str, arguments)]
    with contextlib.ExitStack() as stack:
        stack.enter_context(patch.object(sys, "argv", argv))
        for one in (console.out, console.err):
            stack.enter_context(patch.object(one, "_width", width))
        stack.enter_context(contextlib.redirect_stdout(out))
        stack.enter_context(contextlib.redirect_stderr(err))
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    planted.refuse(out.getvalue(), err.getvalue())
    return Outcome(code, out.getvalue(), err.getvalue())


def refused(*arguments: object, code: int, words: tuple[str, ...] = (), out: Path | None = None) -> str:
    """Run a command that must fail in one line with ``code``, holding all ``words``; nothing may be left at ``out``."""
    outcome = lrmerge(*arguments)
    lines = [line for line in outcome.err.splitlines() if line]
    assert len(lines) == 1, outcome
    assert lines[0].startswith("error: "), outcome
    assert outcome.code == code, outcome
    assert outcome.out == "", outcome
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    if out is not None:
        assert not out.exists()
        assert not out.with_name(out.name + ".partial").exists()
    return lines[0]


@contextlib.contextmanager
def as_nobody() -> Iterator[None]:
    """Do file work without the privileges of root, where the tests run as root."""
    if os.geteuid() != 0:
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


def contents(folder: Path) -> dict[str, bytes]:
    """Every file below ``folder`` with its bytes."""
    return {str(p.relative_to(folder)): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}
