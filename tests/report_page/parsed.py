"""A page taken apart by a parser, without a browser."""

from __future__ import annotations

import json
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, NamedTuple

VOID = {"meta", "link", "img", "br", "input", "line"}


class Tag(NamedTuple):
    """An element: its name, attributes, names of what it stands in, and its own text."""

    name: str
    attributes: dict[str, str]
    within: tuple[str, ...]
    text: list[str]


class Page(HTMLParser):
    """All elements of a file, in order."""

    def __init__(self, path: Path):
        super().__init__(convert_charrefs=True)
        self.source = path.read_text(encoding="utf-8")
        self.tags: list[Tag] = []
        self._open: list[Tag] = []
        self.feed(self.source)
        self.close()
        assert self._open == [], "every element is closed"

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        found = Tag(tag, {key: value or "" for key, value in attrs}, tuple(t.name for t in self._open), [])
        self.tags.append(found)
        if tag not in VOID:
            self._open.append(found)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(Tag(tag, {key: value or "" for key, value in attrs}, tuple(t.name for t in self._open), []))

    def handle_endtag(self, tag: str) -> None:
        assert self._open.pop().name == tag

    def handle_data(self, data: str) -> None:
        for tag in self._open[-1:]:
            tag.text.append(data)

    def all(self, name: str) -> list[Tag]:
        """Every element of that name."""
        return [tag for tag in self.tags if tag.name == name]

    @property
    def ids(self) -> list[str]:
        """Every id, in order."""
        return [tag.attributes["id"] for tag in self.tags if "id" in tag.attributes]

    @property
    def charts(self) -> dict[str, dict[str, Any]]:
        """Id of each figure to its Vega-Lite specification."""
        found = (tag for tag in self.all("script") if "data-chart" in tag.attributes)
        return {tag.attributes["data-chart"]: json.loads("".join(tag.text)) for tag in found}

    def table(self, caption: str) -> list[list[str]]:
        """The rows of the table whose caption begins so, its head first."""
        rows: list[list[str]] = []
        inside = False
        for tag in self.tags:
            if tag.name == "caption":
                inside = "".join(tag.text).startswith(caption)
            elif inside and tag.name == "tr":
                rows.append([])
            elif inside and tag.name in ("th", "td"):
                rows[-1].append("".join(tag.text))
        assert rows, f"no table {caption}"
        return rows
