"""The examples that the project ships are what their README says, and the demo shows what it promises."""

from __future__ import annotations

import re
from pathlib import Path

import demo
import pytest
import tiny_llama
import torch

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
FOLDERS = EXAMPLES / "demo" / "base", EXAMPLES / "demo" / "finetuned"


@pytest.mark.parametrize("folder", FOLDERS, ids=lambda folder: folder.name)
def test_small_llama_gives_the_logits_of_transformers(folder: Path):
    from transformers import LlamaForCausalLM

    config, weights = tiny_llama.load(folder)
    ids = tiny_llama.encode("def extract(base, finetuned):")[None]
    with torch.no_grad():
        wanted = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)(ids).logits
    torch.testing.assert_close(tiny_llama.logits(config, weights, ids), wanted, atol=1e-4, rtol=1e-4)


def test_checkpoints_are_small():
    sizes = [(folder / "model.safetensors").stat().st_size for folder in FOLDERS]
    assert max(sizes) < 1_000_000
    assert sum(sizes) < 1_500_000


def test_demo_recovers_more_of_the_gain_at_each_rank(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["demo.py", str(tmp_path)])
    demo.main()
    printed = capsys.readouterr().out
    gains = [int(percent) for percent in re.findall(r"(\d+)%", printed)]
    assert len(gains) == len(demo.RANKS) + 1
    assert gains == sorted(gains)
    assert gains[0] >= 25  # rank 2
    assert gains[3] >= 75  # rank 16
    assert printed.count("writes:") == 3


def test_every_example_is_in_the_readme():
    text = (EXAMPLES / "README.md").read_text()
    assert {path.name for path in EXAMPLES.glob("*.py")} <= set(re.findall(r"`([\w/]+\.\w+)`", text))
