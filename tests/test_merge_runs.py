"""Merges that are killed, and merges in little memory."""

from __future__ import annotations

import json
import random
import signal
from pathlib import Path

import pytest
import tiny
import torch
import yaml
from processes import ROOM, finish_within, forking, in_a_group, killed, with_a_limit
from safetensors import safe_open

import mergekit_lr as lr


def recipe(folder: Path, method: str, **keys) -> Path:
    """A recipe that merges the models a and b of ``folder`` onto its base."""
    given = [{"model": str(folder / name), "parameters": {"weight": 0.6}} for name in ("a", "b")]
    base = {} if method == "linear" else {"base_model": str(folder / "base")}
    file = folder / f"{method}.yaml"
    file.write_text(yaml.safe_dump({"version": 1, "merge_method": method, "models": given, **base, **keys}))
    return file


@pytest.mark.parametrize("method", ["dare_ties", "della"])
def test_ten_kills_and_the_same_bytes(tmp_path, method):
    """One method works block by block, the other on whole tensors."""
    base = tiny.decoder(dtype=torch.bfloat16, hidden=528, layers=12)
    tiny.save(tmp_path / "base", base, shards=3)
    for seed, name in enumerate("ab"):
        tiny.save(tmp_path / name, tiny.finetuned(base, seed=seed), shards=2)
    made, out = recipe(tmp_path, method, parameters={"density": 0.5}), tmp_path / "out"
    lr.merge(made, tmp_path / "whole")
    chance = random.Random(0)
    process = forking(f"lr.merge({str(made)!r}, {str(out)!r}, resume=True, progress=step)")
    journal, lengths = tmp_path / "out.partial" / "journal.jsonl", []
    for _ in range(10):
        assert killed(process, chance.randrange(1, 5), 0.03 * chance.random()) == signal.SIGKILL
        assert not out.exists()
        lengths.append(len(journal.read_bytes()) if journal.exists() else 0)
    process.communicate()
    assert len(set(lengths)) > 3, "the kills did not land between batches"
    assert lengths == sorted(lengths), "a run began anew"
    lr.merge(made, out, resume=True)
    one, other = tiny.contents(out), tiny.contents(tmp_path / "whole")
    assert one.keys() == other.keys()
    assert all(one[name] == other[name] for name in one if name not in ("lrmerge.json", "README.md"))
    reports = [json.loads(files["lrmerge.json"])["tensors"] for files in (one, other)]
    assert reports[0] == reports[1]


@pytest.fixture(scope="module")
def large(tmp_path_factory) -> Path:
    """Models of which each has a table that is larger than the memory that there will be."""
    folder = tmp_path_factory.mktemp("large")
    base = tiny.decoder(dtype=torch.bfloat16, hidden=960, layers=1)
    for seed, name in enumerate(["base", "a", "b"]):
        model = tiny.finetuned(base, seed=seed)
        model[tiny.TABLE] = tiny.decoder(seed=seed, dtype=torch.bfloat16, hidden=960, layers=0)[tiny.TABLE].repeat(
            1120, 1
        )
        assert model[tiny.TABLE].nbytes > ROOM
        tiny.save(folder / name, model)
    return folder


@pytest.mark.parametrize("limit", [in_a_group, with_a_limit])
@pytest.mark.parametrize("method", ["linear", "ties"])
def test_memory_does_not_grow_with_the_models(limit, method, large, tmp_path):
    given = {} if method == "linear" else {"parameters": {"density": 0.3}}
    made, out = recipe(large, method, **given), tmp_path / "out"
    finish_within(limit, f"lr.merge({str(made)!r}, {str(out)!r}, threads=2)")
    tables = {}
    for name, folder in {"a": large / "a", "b": large / "b", "out": out}.items():
        with safe_open(folder / "model.safetensors", "pt") as file:
            tables[name] = file.get_slice(tiny.TABLE)[-5:].double()
    if method == "linear":
        torch.testing.assert_close(tables["out"], (tables["a"] + tables["b"]) / 2, rtol=8e-3, atol=1e-4)
    assert bool(tables["out"].any())
