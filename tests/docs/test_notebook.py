"""The notebook prints what it shows."""

from __future__ import annotations

import contextlib
import io
import json
import sys

from blocks import differs
from world import ROOT

PLACE = ROOT / "examples"


def test_tour(monkeypatch):
    """The code cells, one after the other in one namespace, as Jupyter runs them from the notebook's own folder."""
    monkeypatch.chdir(PLACE)
    monkeypatch.setattr(sys, "path", [*sys.path])
    notebook = json.loads((PLACE / "tour.ipynb").read_text(encoding="utf-8"))
    names: dict[str, object] = {}
    for cell in (cell for cell in notebook["cells"] if cell["cell_type"] == "code"):
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(compile("".join(cell["source"]), "cell", "exec", dont_inherit=True), names)
        shown = "".join(line for output in cell["outputs"] for line in output["text"])
        assert differs(shown, out.getvalue()) is None


def test_tour_is_small():
    assert (PLACE / "tour.ipynb").stat().st_size < 50_000
