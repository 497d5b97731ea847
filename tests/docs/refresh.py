"""Writes what commands print now into the pages that are given: python tests/docs/refresh.py docs/start.md ..."""

from __future__ import annotations

import os
import sys
import tempfile
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]

from blocks import filled  # noqa: E402
from world import build, enter  # noqa: E402

if __name__ == "__main__":
    with tempfile.TemporaryDirectory() as place:
        world = build(Path(place) / "world")
        for i, page in enumerate([Path(name).resolve() for name in sys.argv[1:]]):
            os.chdir(enter(world, Path(place) / f"page{i}"))
            page.write_text(filled(page.read_text(encoding="utf-8")), encoding="utf-8")
