"""A Llama in sixty lines, as functions on a dictionary of tensors, so that the demo needs torch alone.

Weights carry the names of a transformers ``LlamaForCausalLM`` and give the same logits. Text is ASCII, one
token per character: there is no tokenizer to load.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor

Weights = dict[str, Tensor]


def load(folder: Path) -> tuple[dict, Weights]:
    """The configuration and the float32 weights of a transformers folder with one safetensors file."""
    config = json.loads((folder / "config.json").read_text())
    return config, {name: w.float() for name, w in load_file(folder / "model.safetensors").items()}


def encode(text: str) -> Tensor:
    """Tokens of a text, (n,) int64; what is not ASCII is left out."""
    return torch.tensor(list(text.encode("ascii", "ignore")))


def decode(ids: Tensor) -> str:
    return bytes(ids.tolist()).decode("ascii")


def logits(config: dict, weights: Weights, ids: Tensor) -> Tensor:
    """Next-token logits (batch, n, vocabulary) of ids (batch, n)."""
    batch, n = ids.shape
    heads, kv_heads, eps = config["num_attention_heads"], config["num_key_value_heads"], config["rms_norm_eps"]
    width = config["hidden_size"] // heads
    turn = rotations(n, width, config["rope_parameters"]["rope_theta"])
    x = weights["model.embed_tokens.weight"][ids]
    for i in range(config["num_hidden_layers"]):
        w = {k: weights[f"model.layers.{i}.{k}.weight"] for k in LAYER}
        h = F.rms_norm(x, x.shape[-1:], w["input_layernorm"], eps)
        q, k, v = ((h @ w[f"self_attn.{p}_proj"].T).view(batch, n, -1, width).transpose(1, 2) for p in "qkv")
        q, k = rotate(q, turn), rotate(k, turn)
        k, v = (t.repeat_interleave(heads // kv_heads, dim=1) for t in (k, v))
        mixed = F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).reshape(batch, n, -1)
        x = x + mixed @ w["self_attn.o_proj"].T
        h = F.rms_norm(x, x.shape[-1:], w["post_attention_layernorm"], eps)
        x = x + (F.silu(h @ w["mlp.gate_proj"].T) * (h @ w["mlp.up_proj"].T)) @ w["mlp.down_proj"].T
    return F.rms_norm(x, x.shape[-1:], weights["model.norm.weight"], eps) @ weights["lm_head.weight"].T


LAYER = [
    *(f"self_attn.{p}_proj" for p in "qkvo"),
    *(f"mlp.{p}_proj" for p in ("gate", "up", "down")),
    "input_layernorm",
    "post_attention_layernorm",
]


def rotations(n: int, width: int, theta: float) -> tuple[Tensor, Tensor]:
    """Cosines and sines of rotary positions, each (n, width)."""
    angles = torch.arange(n)[:, None] * theta ** -(torch.arange(0, width, 2) / width)
    angles = torch.cat([angles, angles], dim=-1)
    return angles.cos(), angles.sin()


def rotate(x: Tensor, turn: tuple[Tensor, Tensor]) -> Tensor:
    left, right = x.chunk(2, dim=-1)
    return x * turn[0] + torch.cat([-right, left], dim=-1) * turn[1]


@torch.no_grad()
def loss(config: dict, weights: Weights, text: str, window: int = 128) -> float:
    """Mean cross-entropy per character over consecutive windows of a text, in nats."""
    ids = encode(text)
    ids = ids[: (len(ids) - 1) // window * window + 1]
    x, y = ids[:-1].view(-1, window), ids[1:].view(-1, window)
    return F.cross_entropy(logits(config, weights, x).flatten(0, 1), y.flatten()).item()


@torch.no_grad()
def write_on(config: dict, weights: Weights, prompt: str, characters: int, seed: int = 0) -> str:
    """The prompt and what the model writes after it, sampled at temperature 0.5."""
    generator = torch.Generator().manual_seed(seed)
    ids = encode(prompt)
    for _ in range(characters):
        chances = torch.softmax(logits(config, weights, ids[None, -128:])[0, -1] / 0.5, dim=-1)
        ids = torch.cat([ids, torch.multinomial(chances, 1, generator=generator)])
    return decode(ids)
