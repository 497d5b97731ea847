"""Train the demo's two checkpoints: about ten minutes on one core.

    python examples/train_demo.py [OUT]

The base learns the prose of Python's language reference (``pydoc_data.topics``), the fine-tune goes on, every
weight free, with the source code of the standard library. Both texts come with Python itself; the folders
that are kept here were made with Python 3.11. Both are saved in bfloat16, as most checkpoints are.
"""

from __future__ import annotations

import json
import sys
import sysconfig
from pathlib import Path
from pydoc_data.topics import topics

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from tiny_llama import LAYER, Weights, encode, logits, loss
from torch import Tensor

HERE = Path(__file__).resolve().parent
SOURCES = """
argparse ast collections/__init__ dataclasses datetime difflib enum fractions functools inspect ipaddress
logging/__init__ pathlib pickle random shutil statistics subprocess tarfile textwrap threading typing
unittest/case zipfile
"""
WINDOW, BATCH = 128, 32
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "vocab_size": 128,
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": WINDOW,
    "rms_norm_eps": 1e-5,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "hidden_act": "silu",
    "attention_bias": False,
    "mlp_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
    "dtype": "bfloat16",
}


def start(config: dict, generator: torch.Generator) -> Weights:
    """Random weights: matrices of standard deviation 1 / sqrt(d_in), norms of ones."""
    d, inner = config["hidden_size"], config["intermediate_size"]
    kv = d * config["num_key_value_heads"] // config["num_attention_heads"]
    outer = (config["vocab_size"], d)
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": outer, "lm_head.weight": outer}
    rows = {"self_attn.k_proj": kv, "self_attn.v_proj": kv, "mlp.gate_proj": inner, "mlp.up_proj": inner}
    for i in range(config["num_hidden_layers"]):
        for name in LAYER:
            norm, d_in = name.endswith("norm"), inner if name == "mlp.down_proj" else d
            shapes[f"model.layers.{i}.{name}.weight"] = (d,) if norm else (rows.get(name, d), d_in)
    shapes["model.norm.weight"] = (d,)
    return {
        name: torch.ones(shape) if len(shape) == 1 else torch.randn(shape, generator=generator) * shape[-1] ** -0.5
        for name, shape in shapes.items()
    }


def train(weights: Weights, ids: Tensor, steps: int, rate: float, generator: torch.Generator) -> Weights:
    """The weights after ``steps`` steps of AdamW on random windows of a text, rounded to bfloat16."""
    weights = {name: w.float().clone().requires_grad_() for name, w in weights.items()}
    optimizer = torch.optim.AdamW(weights.values(), lr=rate, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
    for step in range(steps):
        first = torch.randint(len(ids) - WINDOW, (BATCH, 1), generator=generator)
        rows = ids[first + torch.arange(WINDOW + 1)]
        error = F.cross_entropy(logits(CONFIG, weights, rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        schedule.step()
        if step % 100 == 99:
            print(f"step {step + 1}/{steps}  loss {error.item():.3f}", file=sys.stderr)
    return {name: w.detach().bfloat16() for name, w in weights.items()}


def save(folder: Path, weights: Weights) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else HERE / "demo"
    generator = torch.Generator().manual_seed(0)
    prose = encode("\n\n".join(topics[name] for name in sorted(topics)))
    library = Path(sysconfig.get_path("stdlib"))
    code = encode("\n\n".join((library / f"{name}.py").read_text("utf-8") for name in SOURCES.split()))

    base = train(start(CONFIG, generator), prose, steps=1200, rate=4e-3, generator=generator)
    save(out / "base", base)
    finetuned = train(base, code, steps=400, rate=2e-3, generator=generator)
    save(out / "finetuned", finetuned)

    held_out = (HERE / "demo" / "heldout.txt").read_text()
    for name, weights in ("base", base), ("fine-tune", finetuned):
        wide = {key: w.float() for key, w in weights.items()}
        print(f"{name}: loss on held-out code {loss(CONFIG, wide, held_out):.3f}")


if __name__ == "__main__":
    main()
