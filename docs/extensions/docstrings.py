"""Lists in docstrings, for Sphinx: lines "name: text" whose further lines are indented become a list of bullets."""

from __future__ import annotations

import re
from collections.abc import Iterator
from itertools import groupby
from typing import Any

from sphinx.application import Sphinx

ITEM = re.compile(r"^\w[^.:]{0,40}: ")
SECTION = re.compile(r"^\w[\w ]*:$")


def bulleted(lines: list[str]) -> Iterator[str]:
    """The lines of a docstring with such lists in reStructuredText."""
    for blank, group in groupby(lines, lambda line: not line.strip()):
        paragraph = list(group)
        hanging = any(line.startswith(" ") for line in paragraph[1:]) and not paragraph[0].startswith(" ")
        if blank or not hanging or SECTION.match(paragraph[0]):
            yield from paragraph
            continue
        inside = False
        for line in paragraph:
            if ITEM.match(line):
                yield from ([] if inside else [""])
                inside = True
                yield f"* {line}"
            else:
                yield f"  {line.strip()}" if inside else line


def process(app: Sphinx, what: str, name: str, thing: Any, options: Any, lines: list[str]) -> None:
    """Called by autodoc for every docstring."""
    lines[:] = list(bulleted(lines))


def setup(app: Sphinx) -> dict[str, Any]:
    """Runs before napoleon, which takes care of Args, Returns and Raises."""
    app.connect("autodoc-process-docstring", process, priority=400)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
