"""The benchmarks measure what they say: the same pair every time, and the true excess over the best error."""

from __future__ import annotations

import json

import pairs
import pytest
import torch
from safetensors.torch import save_file


@pytest.fixture
def pair(tmp_path, monkeypatch) -> pairs.Pair:
    monkeypatch.setitem(pairs.INTERMEDIATE, 64, 160)
    return pairs.make_pair(tmp_path, 64, 2)


def write_adapter(folder, pair: pairs.Pair, rank: int, *, worse: float = 0.0) -> None:
    """The best adapter of that rank with alpha = 2 rank, its last direction scaled by 1 - worse."""
    folder.mkdir()
    tensors = {}
    for name, delta in pairs.deltas(pair):
        u, s, vh = torch.linalg.svd(delta.double(), full_matrices=False)
        s[rank - 1] *= 1 - worse
        tensors[f"base_model.model.{name}.lora_A.weight"] = vh[:rank].contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = (u[:, :rank] * s[:rank] / 2).contiguous()
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"lora_alpha": 2 * rank, "alpha_pattern": {}}))


def test_best_adapter_has_no_excess(pair, tmp_path):
    write_adapter(tmp_path / "best", pair, 8)
    assert pairs.excess(pair, tmp_path / "best", 8).worst == pytest.approx(0, abs=1e-5)


def test_excess_of_a_known_fault(pair, tmp_path):
    write_adapter(tmp_path / "worse", pair, 8, worse=1.0)
    lost = pairs.best_errors(pair, 7)
    best = pairs.best_errors(pair, 8)
    wanted = max(lost[name] / best[name] - 1 for name in best)
    assert pairs.excess(pair, tmp_path / "worse", 8).worst == pytest.approx(wanted, abs=1e-5)


def test_another_rank_is_refused(pair, tmp_path):
    write_adapter(tmp_path / "other", pair, 4)
    with pytest.raises(ValueError, match="rank 4, expected 8"):
        pairs.excess(pair, tmp_path / "other", 8)


def test_pairs_are_made_the_same_way_twice(pair, tmp_path):
    again = pairs.make_pair(tmp_path / "again", 64, 2)
    for file in sorted(pair.finetuned.iterdir()):
        assert file.read_bytes() == (again.finetuned / file.name).read_bytes()
