"""The folder in which the pages are read: models and adapters under the names that the pages use, all tiny.

org/base has eight layers, so that gradients and ranges of layers in recipes mean something.
org/math, org/code and org/chat are fine-tunes of it, org/tools one with two tokens more. org/math-lora, org/code-lora
(rank 8) and org/chat-lora (rank 4) are adapters that started from the same A, as those of one training script do.
style.safetensors is a kohya file for a UNet. examples/ is the project's own.
"""

from __future__ import annotations

import json
from pathlib import Path

import torch
from safetensors.torch import save_file
from tiny import CONFIG, HEAD, PREFIX, TABLE, VOCABULARY, decoder, finetuned, save
from tokenizers import Tokenizer
from tokenizers.models import WordLevel

ROOT = Path(__file__).resolve().parents[2]
LAYERS, HIDDEN = 8, 24
TASKS = {"math": 8, "code": 8, "chat": 4}


def build(folder: Path) -> Path:
    """Writes the world into ``folder``."""
    base = decoder(hidden=HIDDEN, layers=LAYERS, dtype=torch.bfloat16)
    config = CONFIG | {"num_hidden_layers": LAYERS, "torch_dtype": "bfloat16"}
    _tokenizer(save(folder / "org" / "base", base, config=config))
    tools = finetuned(base, seed=9, rank=4)
    tools |= {name: torch.cat([tools[name], tools[name][:2]]) for name in (TABLE, HEAD)}
    _tokenizer(save(folder / "org" / "tools", tools, config=config | {"vocab_size": VOCABULARY + 2}), more=2)
    for seed, (task, rank) in enumerate(TASKS.items(), start=1):
        _tokenizer(save(folder / "org" / task, finetuned(base, seed=seed, rank=rank), config=config))
        _adapter(folder / "org" / f"{task}-lora", base, rank=rank, seed=seed)
    (folder / "org" / "finetuned").symlink_to("math")
    _kohya(folder / "style.safetensors")
    (folder / "examples").symlink_to(ROOT / "examples")
    return folder


def enter(world: Path, folder: Path) -> Path:
    """A folder of its own for one page, with the world in it."""
    folder.mkdir(parents=True, exist_ok=True)
    for entry in world.iterdir():
        (folder / entry.name).symlink_to(entry)
    return folder


def _adapter(folder: Path, base: dict[str, torch.Tensor], *, rank: int, seed: int) -> None:
    """A LoRA of every projection, in PEFT's format."""
    start, random = torch.Generator().manual_seed(0), torch.Generator().manual_seed(seed)
    tensors = {}
    for name in (name for name in base if name.endswith("_proj.weight")):
        rows, columns = base[name].shape
        key = PREFIX + name.removesuffix(".weight")
        moved = 0.06 * torch.randn(rank, columns, generator=random)
        tensors[f"{key}.lora_A.weight"] = 0.2 * torch.randn(8, columns, generator=start)[:rank] + moved
        tensors[f"{key}.lora_B.weight"] = 0.1 * torch.randn(rows, rank, generator=random)
    folder.mkdir(parents=True)
    save_file(tensors, folder / "adapter_model.safetensors", metadata={"format": "pt"})
    config = {
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": "org/base", "r": rank,
        "lora_alpha": 2 * rank, "bias": "none", "inference_mode": True,
        "target_modules": [f"{p}_proj" for p in ("q", "k", "v", "o", "gate", "up", "down")],
    }  # fmt: skip
    (folder / "adapter_config.json").write_text(json.dumps(config))


def _kohya(file: Path) -> None:
    """A LoRA of two attention projections, rank 4 and alpha 2, as kohya's scripts write it."""
    random, tensors = torch.Generator().manual_seed(7), {}
    for projection in ("to_q", "to_v"):
        module = f"lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_{projection}"
        tensors[f"{module}.lora_down.weight"] = torch.randn(4, 16, generator=random)
        tensors[f"{module}.lora_up.weight"] = torch.randn(16, 4, generator=random)
        tensors[f"{module}.alpha"] = torch.tensor(2.0)
    facts = {"ss_network_dim": "4", "ss_network_alpha": "2.0", "ss_network_module": "networks.lora"}
    save_file(tensors, file, metadata=facts)


def _tokenizer(folder: Path, more: int = 0) -> None:
    """One word for each row of the tables, and ``more`` for calls of tools."""
    words = [f"word{i}" for i in range(VOCABULARY)] + ["<call>", "<result>"][:more]
    made = Tokenizer(WordLevel({word: i for i, word in enumerate(words)}, unk_token=words[0]))
    made.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps({"tokenizer_class": "PreTrainedTokenizerFast"}))
