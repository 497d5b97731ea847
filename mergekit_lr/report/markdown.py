"""Names from files in Markdown: nothing in them may be more than text there, whatever characters they hold."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergekit_lr.errors import printable

_SPECIAL = re.compile(r"([\\`*_\[\]<>|~&$#])")
_NUMBER = re.compile(r"-?[\d.,]+(e[+-]?\d+)?%?")


def plain(text: str) -> str:
    """``text`` as running text on one line: no emphasis, no link, no HTML, no entity, no table cell."""
    return _SPECIAL.sub(r"\\\1", printable(text))


def code(text: str) -> str:
    """``text`` as code in a line."""
    shown = printable(text)
    ticks = "`" * (1 + max((len(run) for run in re.findall("`+", shown)), default=0))
    space = " " if shown[:1] in ("`", " ", "") or shown[-1:] in ("`", " ") else ""
    return f"{ticks}{space}{shown}{space}{ticks}"


def fenced(text: str, language: str) -> str:
    """``text`` as a block of code that nothing inside it can end."""
    lines = [printable(line) for line in text.strip("\n").split("\n")]
    ticks = "`" * max(3, 1 + max((len(run) for run in re.findall("`+", text)), default=0))
    return "\n".join((f"{ticks}{language}", *lines, ticks))


def table(header: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A table; the cells are Markdown already. Columns of numbers are set flush right."""
    held = [list(row) for row in rows]
    numeric = [all(_NUMBER.fullmatch(row[column]) for row in held) for column in range(len(header))]
    rule = ["---:" if right else "---" for right in numeric]
    # A pipe ends a cell even within code.
    cells = ([re.sub(r"(?<!\\)\|", r"\|", cell) for cell in row] for row in (header, rule, *held))
    return "\n".join(f"| {' | '.join(row)} |" for row in cells)


def listed(items: Sequence[str]) -> str:
    """``a, b and c``."""
    return f"{', '.join(items[:-1])} and {items[-1]}" if len(items) > 1 else "".join(items)


def bullets(items: Iterable[str]) -> str:
    """A list; the items are Markdown already."""
    return "\n".join(f"- {item}" for item in items)
