"""Real fine-tunes: what PEFT loads from an extracted LoRA is within 1% of the best error, and as accurate.

The exact truncated SVD gives the accuracies of the reference table to the last digit. A few of 500 answers may turn
over for an approximation 1% worse: if five do, the standard error of the paired difference is sqrt(5) / 500, and
two of those are 0.9 points.
"""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import torch
import zoo_extract

import mergekit_lr as lr

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "zoo"
ZOO = Path(os.environ.get("LRMERGE_ZOO", BESIDE))
TOLERANCE = 2 * math.sqrt(5) / 500

pytestmark = pytest.mark.skipif(not ZOO.exists(), reason="needs LRMERGE_ZOO, the folder of real fine-tunes")


@pytest.fixture(scope="module", params=["half", "roletail"])
def task(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def finetuned(task, tmp_path_factory) -> Path:
    return zoo_extract.script(ZOO, "full").build(task, tmp_path_factory.mktemp("full"))


@pytest.fixture(scope="module")
def wanted(finetuned) -> zoo_extract.Deltas:
    return zoo_extract.deltas(ZOO / "base", finetuned)


@pytest.fixture(scope="module")
def bests(wanted) -> dict[str, zoo_extract.Best]:
    return {name: zoo_extract.best(delta) for name, delta in wanted.items()}


@pytest.mark.parametrize("rank", [4, 16, 64])
def test_rank(task, finetuned, wanted, bests, rank, tmp_path):
    evaluate = zoo_extract.script(ZOO, "evaluate")
    lr.extract(ZOO / "base", finetuned, tmp_path / "out", rank=rank)
    loaded = zoo_extract.load(evaluate, ZOO / "base", tmp_path / "out")

    assert loaded.missing == []
    assert loaded.unexpected == []
    assert len(wanted) == 36
    assert zoo_extract.excess(loaded.deltas, wanted, bests, rank) <= 0.01
    reference = zoo_extract.reference(ZOO)[task][rank]
    assert abs(evaluate.accuracy(loaded.encoder, task) - reference) <= TOLERANCE


@torch.no_grad()
def test_error_zero_gives_the_fine_tune_back(task, finetuned, tmp_path):
    evaluate = zoo_extract.script(ZOO, "evaluate")
    lr.extract(ZOO / "base", finetuned, tmp_path / "out", error=0)
    loaded = zoo_extract.load(evaluate, ZOO / "base", tmp_path / "out")
    ids, lengths, types, _ = (column[:64] for column in evaluate.load_split(task, "test"))
    logits = {
        name: evaluate.logits(task, evaluate.features(encoder.eval(), ids, lengths, types))
        for name, encoder in {
            "fine-tune": evaluate.load_encoder(finetuned),
            "again": loaded.encoder,
            "base": evaluate.load_encoder(ZOO / "base"),
        }.items()
    }

    assert loaded.missing == []
    assert loaded.unexpected == []
    # Both checkpoints are float16: half a unit in the last place of every weight, 2^-11, moves logits of size 10 by
    # about as much.
    torch.testing.assert_close(logits["again"], logits["fine-tune"], atol=10 * 2**-11, rtol=0)
    assert (logits["base"] - logits["fine-tune"]).abs().max() > 1
