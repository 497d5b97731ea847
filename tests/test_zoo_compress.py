"""Real LoRAs at lower ranks: as accurate as the exact truncation that the reference table was made with."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest
import zoo_compress

BESIDE = Path(__file__).resolve().parents[2] / "shared" / "zoo"
ZOO = Path(os.environ.get("LRMERGE_ZOO", BESIDE))
# Two standard errors of the paired difference if five of 500 answers turn over.
TOLERANCE = 2 * math.sqrt(5) / 500

pytestmark = pytest.mark.skipif(not ZOO.exists(), reason="needs LRMERGE_ZOO, the folder of real fine-tunes")


@pytest.mark.parametrize("task", ["half", "toolkit"])
@pytest.mark.parametrize("rank", [8, 2])
def test_rank(task, rank, tmp_path):
    found, _ = zoo_compress.compressed_accuracy(ZOO, task, rank, tmp_path / "out")
    assert abs(found - zoo_compress.reference(ZOO)[task][rank]) <= TOLERANCE
