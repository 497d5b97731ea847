"""Everything that a page tells the reader to type does what the page says.

    LRMERGE_WRITE_PAGES=1 pytest tests/docs/test_pages.py -k plan

writes what the commands print now into the pages, instead of comparing; blocks with a line "..." stay as they are.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest
from blocks import blocks, filled, perform
from hub_server import Hub, Repository
from tiny import CONFIG
from world import ROOT, enter

from mergekit_lr.methods import registry

PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name not in ("methods", "json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_page(page: Path, world: Path, served: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(enter(world, tmp_path / "page"))
    monkeypatch.setattr(registry, "_METHODS", registry.methods())  # a page may add one
    served.repositories["org/base"] = Repository({"main": {"config.json": json.dumps(CONFIG).encode()}})
    text = page.read_text(encoding="utf-8")
    if os.environ.get("LRMERGE_WRITE_PAGES"):
        page.write_text(filled(text), encoding="utf-8")
        return
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(text):
        perform(block, names)
