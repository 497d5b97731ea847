"""What a page is put together from: sections of figures, every figure with its numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_lr.report.page import charts
from mergekit_lr.report.page.places import OUTSIDE, Place, kinds_of, layers_of, short

NARROW = 40  # layers; a map of more takes the whole width


class Table(NamedTuple):
    """A table whose first ``heads`` columns name the row."""

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]
    heads: int = 1


class Select(NamedTuple):
    """A choice that a figure listens to; options as (value, text)."""

    id: str
    label: str
    options: tuple[tuple[str, str], ...]


class Key(NamedTuple):
    """One entry of a legend: a colour of the page, the dashes of a line."""

    name: str
    colour: str
    dashes: str


@dataclass(frozen=True)
class Figure:
    """A chart with its words. marks: how many lines, cells or bars it draws at first. spec: Vega-Lite.

    small: it may stand beside others.
    """

    id: str
    title: str
    caption: str
    marks: int
    spec: charts.Spec
    table: Table
    selects: tuple[Select, ...] = ()
    legend: tuple[Key, ...] = ()
    small: bool = False


@dataclass(frozen=True)
class Section:
    """A part of the page."""

    id: str
    title: str
    text: str = ""
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    notes: tuple[str, ...] = ()


def legend(kinds: Sequence[str], *, shown: Container[str] | None = None) -> tuple[Key, ...]:
    """The legend of all kinds, or of those of them that are shown."""
    keys = (Key(kind, charts.hue(i), " ".join(map(str, charts.dashes(i)))) for i, kind in enumerate(kinds))
    return tuple(key for key in keys if shown is None or key.name in shown)


def layer_figure(
    id: str,
    title: str,
    caption: str,
    values: Iterable[tuple[Place, float]],
    *,
    value: str,
    written: Callable[[float], str],
    diverging: bool = False,
    top: float = 0.0,
) -> Figure:
    """A map of layers by kinds; of several modules in one cell the mean. value: what is shown, written: as text."""
    groups: dict[Place, list[float]] = {}
    for place, number in values:
        groups.setdefault(place, []).append(number)
    held = {place: sum(numbers) / len(numbers) for place, numbers in groups.items()}
    layers, kinds = layers_of(held), kinds_of(held)
    names = short(kinds)
    rows: list[dict[str, Any]] = [
        {"layer": place.layer, "kind": names[place.kind], "value": float(f"{number:.5g}"), "shown": written(number)}
        for place, number in held.items()
    ]
    cells = {place: written(number) for place, number in held.items()}
    lines = tuple((layer_name(layer), *(cells.get(Place(layer, k), "") for k in kinds)) for layer in layers)
    if OUTSIDE in layers:
        caption += f" {OUTSIDE} is what stands outside of the layers."
    shown = [names[kind] for kind in kinds]
    spec = charts.layer_map(rows, layers, shown, value=value, diverging=diverging, top=top)
    table = Table(title, ("layer", *shown), lines)
    return Figure(id, title, caption, len(held), spec, table, small=len(layers) <= NARROW)


def layer_name(layer: str) -> str:
    """A layer in words."""
    return "outside" if layer == OUTSIDE else layer
