"""Everything that a page tells the reader to type does what the page says."""

from __future__ import annotations

from pathlib import Path

import pytest
from blocks import blocks, perform
from world import ROOT, enter

from mergekit_lr.methods import registry

PAGES = sorted(path for path in (ROOT / "docs").rglob("*.md") if path.parent.name not in ("methods", "json"))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT / "docs")))
def test_page(page: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(enter(world, tmp_path / "page"))
    monkeypatch.setattr(registry, "_METHODS", registry.methods())  # a page may add one
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page.read_text(encoding="utf-8")):
        perform(block, names)
