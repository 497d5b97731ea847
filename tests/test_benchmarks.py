"""The benchmarks measure what they say: the same pair every time, and the true excess over the best error."""

from __future__ import annotations

import argparse
import json

import dense_routes
import merge_files
import merge_spectral
import pairs
import pytest
import torch
from safetensors.torch import save_file

import mergekit_lr as lr
from mergekit_lr.methods.delta import as_dense


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


def test_dense_routes_are_the_methods():
    deltas = torch.randn(3, 24, 20, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for name in ("iso_c", "iso_cts", "tsv_m"):
        dense = getattr(dense_routes, name)(deltas)
        torch.testing.assert_close(as_dense(lr.merge_tensors(name, deltas)), dense, rtol=0, atol=1e-10)
    factors = [factor.to(torch.float64) for factor in merge_spectral.adapters(24, 20, 3, 2)]
    held = [factor.folded() for factor in factors]
    merged = dense_routes.core_space([f.B for f in held], [f.A for f in held], dense_routes.total)
    ours = lr.merge_tensors("task_arithmetic", factors, space="core")
    torch.testing.assert_close(as_dense(ours), merged, rtol=0, atol=1e-10)
    merged = dense_routes.knots([factor.dense() for factor in factors], dense_routes.total)
    ours = lr.merge_tensors("task_arithmetic", factors, space="knots")
    torch.testing.assert_close(as_dense(ours), merged, rtol=0, atol=1e-10)


@pytest.mark.parametrize("method", merge_files.METHODS)
def test_files_benchmark_knows_an_error(method, tmp_path):
    sizes = argparse.Namespace(hidden=64, layers=1, vocabulary=50, models=3, shard_size=10**5)
    models = merge_files.make_models(tmp_path / "models", sizes)
    used, out = models.used(method), tmp_path / "out"
    lr.merge(merge_files.recipe(method, models), out)
    error, rounding = merge_files.errors(method, used, out)
    assert 0 < error < 1.1 * rounding
    far, _ = merge_files.errors(method, used, models.tuned[2])
    assert far > 2 * rounding


def test_spectral_benchmark_knows_an_error():
    deltas = merge_spectral.full_rank_deltas(32, 2, "finetune")
    summed = dense_routes.total(deltas)
    exact = dense_routes.iso_c([delta.double() for delta in deltas])
    wrong = exact.clone()
    wrong[:, 0] += 0.1 * exact.norm()
    assert merge_spectral.error(exact.float(), exact, summed) < 1e-6
    assert merge_spectral.error(wrong, exact, summed) > 0.01
