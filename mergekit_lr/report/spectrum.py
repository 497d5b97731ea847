"""The spectrum of a change as a small picture and a table: what share of it each rank keeps, by kind of module.

One line per kind (``q_proj``, ``down_proj`` ...): the share of the squared norm that the first k singular directions
hold, over all modules of the kind together. The picture is an SVG of a few kB with a background of its own, so that it
is legible on a light page and on a dark one, and needs no library.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple
from xml.sax.saxutils import escape

from mergekit_lr.errors import printable
from mergekit_lr.report.markdown import code, table

FILE = "spectrum.svg"
MOST_LINES = 8  # kinds with the largest change; more cannot be told apart
# Okabe and Ito's colours, told apart by all who see colours differently, without the yellow that white swallows.
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#56b4e9", "#e69f00", "#000000", "#7f7f7f")
_WIDTH, _HEIGHT, _LEFT, _TOP, _RIGHT, _BOTTOM = 720, 340, 58, 34, 168, 44


class Spectrum(NamedTuple):
    """Singular values of one module's change, as far as they are known, with its squared norm and its kept rank."""

    name: str
    values: Sequence[float]
    squared_norm: float


class Line(NamedTuple):
    """One kind: the share kept at rank 1, 2, ...; ``modules`` of it, ``weight`` its part of the whole squared norm."""

    kind: str
    modules: int
    shares: tuple[float, ...]
    weight: float


def lines_of(spectra: Iterable[Spectrum]) -> list[Line]:
    """The kinds with the largest change, in that order. A kind is known as far as all of its modules are."""
    groups: dict[str, list[Spectrum]] = {}
    for one in spectra:
        if one.values and one.squared_norm > 0:
            groups.setdefault(_kind(one.name), []).append(one)
    whole = sum(one.squared_norm for held in groups.values() for one in held)
    lines = []
    for kind, held in groups.items():
        norm = sum(one.squared_norm for one in held)
        kept, shares = 0.0, []
        for k in range(max(len(one.values) for one in held)):
            kept += sum(one.values[k] ** 2 for one in held if k < len(one.values))
            shares.append(min(kept / norm, 1.0))
        lines.append(Line(kind, len(held), tuple(shares), norm / whole))
    return sorted(lines, key=lambda line: -line.weight)[:MOST_LINES]


def spectrum_table(lines: Sequence[Line]) -> str:
    """Share kept by kind at ranks that double."""
    longest = max(len(line.shares) for line in lines)
    ranks = [2**k for k in range(longest.bit_length()) if 2**k < longest] + [longest]
    ranks = ranks[-7:]
    rows = [
        [code(line.kind), str(line.modules), *(f"{line.shares[min(k, len(line.shares)) - 1]:.1%}" for k in ranks)]
        for line in lines
    ]
    return table(["kind", "modules", *(f"rank {k}" for k in ranks)], rows)


def spectrum_svg(lines: Sequence[Line]) -> str:
    """The picture: rank on a logarithmic axis, share kept from 0 to 100 %."""
    longest = max(len(line.shares) for line in lines)
    width, height = _WIDTH - _LEFT - _RIGHT, _HEIGHT - _TOP - _BOTTOM
    span = math.log2(longest) or 1.0

    def x(rank: int) -> float:
        return _LEFT + width * math.log2(rank) / span

    def y(share: float) -> float:
        return _TOP + height * (1 - share)

    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {_WIDTH} {_HEIGHT}" font-family="sans-serif" '
        'font-size="13" fill="#222" role="img">',
        "<title>Share of the change that each rank keeps, by kind of module</title>",
        f'<rect width="{_WIDTH}" height="{_HEIGHT}" rx="6" fill="#fff"/>',
        f'<text x="{_LEFT}" y="20">share of the squared norm of the change</text>',
        f'<text x="{_LEFT + width / 2}" y="{_HEIGHT - 8}" text-anchor="middle">rank</text>',
    ]
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        parts.append(f'<path d="M{_LEFT} {y(share):.1f}h{width}" stroke="#ddd"/>')
        parts.append(f'<text x="{_LEFT - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:.0%}</text>')
    parts += [
        f'<text x="{x(2**k):.1f}" y="{_TOP + height + 18}" text-anchor="middle">{2**k}</text>'
        for k in range(longest.bit_length())
    ]
    for at, (line, colour) in enumerate(zip(lines, _COLOURS, strict=False)):
        points = " ".join(f"{x(k):.1f},{y(share):.1f}" for k, share in _drawn(line.shares))
        mark = f'<circle cx="{x(1):.1f}" cy="{y(line.shares[0]):.1f}" r="3" fill="{colour}"/>'
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>{mark}')
        row = _TOP + 8 + 22 * at
        parts.append(f'<path d="M{_WIDTH - _RIGHT + 14} {row - 4}h18" stroke="{colour}" stroke-width="3"/>')
        parts.append(f'<text x="{_WIDTH - _RIGHT + 38}" y="{row}">{escape(_short(line.kind))}</text>')
    return "\n".join((*parts, "</svg>\n"))


def _drawn(shares: Sequence[float]) -> list[tuple[int, float]]:
    """Rank and share where the eye can tell a difference: no more than some 40 points to a doubling."""
    picked = {max(1, round(2 ** (step / 40))) for step in range(40 * len(shares).bit_length() + 1)}
    return [(k, shares[k - 1]) for k in sorted(picked | {len(shares)}) if k <= len(shares)]


def _kind(name: str) -> str:
    """The last part of a module's path that is a word, with what it is below where that says more: ``to_out.0``."""
    parts = name.removesuffix(".weight").split(".")
    last = max((i for i, part in enumerate(parts) if not part.isdigit()), default=0)
    return ".".join(parts[last:])


def _short(kind: str) -> str:
    shown = printable(kind)
    return shown if len(shown) <= 17 else f"...{shown[-14:]}"
