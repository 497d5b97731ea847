"""Llama-shaped pairs of checkpoints, and the error of an adapter against the best possible one.

A pair is made from its size alone: bfloat16, one shard per layer, embeddings and norms unchanged. The delta of
each linear weight, 3% of the weight in norm, is a head of rank 32, a tail that decays as i^-0.7 over a quarter
of the directions, and the rounding of the sum to bfloat16, a flat tail in every direction.

The best error of rank r is that of Eckart and Young (1936): sqrt(sum of the squared singular values behind the
r-th). They come from a float64 Gram matrix, once per pair, and stay in a file beside it.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

INTERMEDIATE = {512: 1408, 1024: 2816, 2048: 5632, 4096: 11008}
LAYERS = {512: 8, 1024: 8, 2048: 4, 4096: 2}
VOCABULARY = 2000  # small: embeddings are not what is measured


class Pair(NamedTuple):
    """Two folders: ``folder/base`` and ``folder/finetuned``."""

    folder: Path
    hidden: int
    layers: int

    @property
    def base(self) -> Path:
        return self.folder / "base"

    @property
    def finetuned(self) -> Path:
        return self.folder / "finetuned"


def linear_shapes(hidden: int) -> dict[str, tuple[int, int]]:
    """The seven linear weights of a layer, (d_out, d_in)."""
    inner = INTERMEDIATE[hidden]
    attention = {f"self_attn.{p}_proj": (hidden, hidden) for p in "qkvo"}
    return attention | {
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }


def make_pair(workdir: Path, hidden: int, layers: int) -> Pair:
    """The pair of that size under ``workdir``, made when it is not there yet."""
    pair = Pair(workdir / f"llama-{hidden}x{layers}", hidden, layers)
    if pair.folder.exists():
        return pair
    partial = pair._replace(folder=pair.folder.with_suffix(".partial"))
    shutil.rmtree(partial.folder, ignore_errors=True)
    for folder in partial.base, partial.finetuned:
        folder.mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps(_config(hidden, layers), indent=2))
    where: dict[str, str] = {}
    for number in range(layers + 1):
        file = f"model-{number + 1:05d}-of-{layers + 1:05d}.safetensors"
        shard = _outer_shard(hidden) if number == layers else _layer_shard(hidden, number)
        save_file({k: w for k, (w, _) in shard.items()}, partial.base / file, {"format": "pt"})
        save_file({k: w for k, (_, w) in shard.items()}, partial.finetuned / file, {"format": "pt"})
        where |= dict.fromkeys(shard, file)
    for folder in partial.base, partial.finetuned:
        index = {"metadata": {}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    partial.folder.rename(pair.folder)
    return pair


def deltas(pair: Pair) -> Iterator[tuple[str, Tensor]]:
    """Each linear module's name and its exact float32 delta (d_out, d_in)."""
    files = sorted(path.name for path in pair.base.glob("*.safetensors"))
    for file in files:
        with safe_open(pair.base / file, "pt") as before, safe_open(pair.finetuned / file, "pt") as after:
            for key in before.keys():  # noqa: SIM118 (no mapping)
                if "_proj" in key:
                    delta = after.get_tensor(key).float().sub_(before.get_tensor(key).float())
                    yield key.removesuffix(".weight"), delta


def best_errors(pair: Pair, rank: int) -> dict[str, float]:
    """Frobenius error of the best approximation of that rank, per module."""
    cache = pair.folder / f"best-rank-{rank}.json"
    if not cache.exists():
        best = {}
        for module, delta in deltas(pair):
            wide = (delta if delta.shape[0] <= delta.shape[1] else delta.T).double()
            energies = torch.linalg.eigvalsh(wide @ wide.T)  # ascending
            best[module] = math.sqrt(energies[:-rank].clamp(min=0).sum().item())
        cache.write_text(json.dumps(best, indent=1))
    return json.loads(cache.read_text())


class Excess(NamedTuple):
    """Error over the best error of that rank, minus one."""

    worst: float
    mean: float


def excess(pair: Pair, adapter: Path, rank: int) -> Excess:
    """How far a PEFT LoRA folder is from the best of that rank. Reads the files, trusts no report.

    Raises:
        ValueError: when the adapter does not hold exactly the linear modules of the pair at that rank.
    """
    config = json.loads((adapter / "adapter_config.json").read_text())
    factors = load_file(adapter / "adapter_model.safetensors")
    best = best_errors(pair, rank)
    over = []
    for module, delta in deltas(pair):
        prefix = f"base_model.model.{module}.lora_"
        a, b = factors[f"{prefix}A.weight"].float(), factors[f"{prefix}B.weight"].float()
        if a.shape[0] != rank:
            raise ValueError(f"{adapter}: {module} has rank {a.shape[0]}, expected {rank}")
        alpha = next(
            (v for k, v in (config.get("alpha_pattern") or {}).items() if module.endswith(k)),
            config["lora_alpha"],
        )
        delta.addmm_(b, a, alpha=-alpha / rank)
        over.append(torch.linalg.vector_norm(delta, dtype=torch.float64).item() / best[module] - 1)
    if len(over) != 7 * pair.layers:
        raise ValueError(f"{pair.folder}: {len(over)} linear modules, expected {7 * pair.layers}")
    return Excess(max(over), sum(over) / len(over))


def _layer_shard(hidden: int, layer: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1000 * hidden + layer)
    shard = {}
    for name, (m, n) in linear_shapes(hidden).items():
        base = torch.randn(m, n, generator=generator).mul_(0.02)
        k = min(m, n) // 4
        weight = torch.arange(1, k + 1) ** -0.7
        weight[:32] *= 3
        left = torch.randn(m, k, generator=generator) * weight
        delta = left @ torch.randn(k, n, generator=generator)
        base = base.bfloat16()
        tuned = (base.float() + delta.mul_(0.03 * base.float().norm() / delta.norm())).bfloat16()
        shard[f"model.layers.{layer}.{name}.weight"] = base, tuned
    for norm in "input_layernorm", "post_attention_layernorm":
        ones = torch.ones(hidden, dtype=torch.bfloat16)
        shard[f"model.layers.{layer}.{norm}.weight"] = ones, ones.clone()
    return shard


def _outer_shard(hidden: int) -> dict[str, tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1000 * hidden + 999)
    table = torch.randn(2, VOCABULARY, hidden, generator=generator).mul_(0.02).bfloat16()
    ones = torch.ones(hidden, dtype=torch.bfloat16)
    outer = {"model.embed_tokens.weight": table[0], "lm_head.weight": table[1], "model.norm.weight": ones}
    return {name: (w.clone(), w.clone()) for name, w in outer.items()}


def _config(hidden: int, layers: int) -> dict:
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCABULARY,
        "hidden_size": hidden,
        "intermediate_size": INTERMEDIATE[hidden],
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 64,
        "max_position_embeddings": 2048,
        "rms_norm_eps": 1e-5,
        "tie_word_embeddings": False,
        "bos_token_id": None,
        "eos_token_id": None,
        "dtype": "bfloat16",
    }
