"""The examples that the project ships are what their README says, and the demo shows what it promises."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import demo
import pytest
import tiny_llama
import torch
from lrmerge.app import app

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


@pytest.fixture(scope="module")
def printed(tmp_path_factory) -> str:
    """What the demo prints."""
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(io.StringIO()) as out:
        patch.setattr("sys.argv", ["demo.py", str(tmp_path_factory.mktemp("demo"))])
        demo.main()
    return out.getvalue()


def losses(text: str) -> dict[str, float]:
    """Name of a row of the demo's table to its loss."""
    return {name.strip(): float(loss) for name, loss in re.findall(r"^(\S.*?)\s+\d+ kB +(\d\.\d{3})", text, re.M)}


def test_demo_recovers_more_of_the_gain_at_each_rank(printed):
    gains = [int(percent) for percent in re.findall(r"(\d+)%", printed)]
    assert len(gains) == len(demo.RANKS) + 1
    assert gains == sorted(gains)
    assert gains[0] >= 25  # rank 2
    assert gains[3] >= 75  # rank 16
    assert printed.count("writes:") == 3


def test_readme_shows_what_the_demo_prints(printed):
    shown = losses((EXAMPLES.parent / "README.md").read_text())
    assert len(shown) == len(demo.RANKS) + 2
    assert shown == pytest.approx(losses(printed), abs=0.01)


def test_readme_names_every_command_and_no_other():
    shown = set(re.findall(r"^\| `lrmerge (\w+)", (EXAMPLES.parent / "README.md").read_text(), re.M))
    assert shown == {command.callback.__name__ for command in app.registered_commands if command.callback}


def test_every_example_is_in_the_readme():
    text = (EXAMPLES / "README.md").read_text()
    files = {path.name for ending in ("py", "ipynb") for path in EXAMPLES.glob(f"*.{ending}")}
    assert files <= set(re.findall(r"`([\w/]+\.\w+)`", text))
