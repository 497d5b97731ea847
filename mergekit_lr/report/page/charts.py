"""The figures, as Vega-Lite 6 specifications (vega.github.io/vega-lite).

Colours are CSS variables of the page, so that a figure follows light, dark and paper without being drawn again.
Scales are in steps: a reader can match a step to the legend, and a step is one CSS variable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

Spec = dict[str, Any]
Rows = list[dict[str, Any]]

STEPS = 7
SEQUENTIAL = [f"var(--step-{i})" for i in range(STEPS)]
DIVERGING = [f"var(--fork-{i})" for i in range(STEPS)]
HUES = [f"var(--hue-{i})" for i in range(8)]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]]  # where hues come again, dashes tell them apart
ROW = 24  # pixels of a row of a map
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"

WORDS: Spec = {"titleColor": "var(--ink-2)", "titleFontWeight": "normal", "titleFontSize": 12, "labelFontSize": 12}
CONFIG: Spec = {
    "aria": False,  # a screen reader is given the caption and the table; a thousand marks would be in its way
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        **WORDS,
        "labelColor": "var(--ink-2)",
        "gridColor": "var(--rule)",
        "domainColor": "var(--rule-2)",
        "tickColor": "var(--rule-2)",
        "titlePadding": 8,
    },
    "legend": {
        **WORDS,
        "labelColor": "var(--ink)",
        "gradientThickness": 10,
        "gradientStrokeColor": "var(--rule-2)",
    },
}
NAMES: Spec = {"ticks": False, "domain": False}  # an axis of names


def hue(index: int) -> str:
    """The colour of a kind, by its number."""
    return HUES[index % len(HUES)]


def dashes(index: int) -> list[int]:
    """The dashes of its line."""
    return DASHES[index // len(HUES) % len(DASHES)]


def energy_chart(rows: Rows, kinds: Sequence[str], *, select_kind: str, select_layer: str) -> Spec:
    """Energy against rank; the two selects of the page say which lines are shown.

    rows: layer (``all``: the kind as a whole), n (its number as 0 to 1), kind, rank, energy, first (shown at first).
    kinds: all of them, in the order of their colours.
    """
    selects = {"kind": select_kind, "layer": select_layer}
    wanted = (
        "kind == 'all' && layer == 'all' ? datum.first : (kind == 'all' || datum.kind == kind)"
        " && (layer == 'all' ? datum.layer != 'all' : datum.layer == layer)"
    )
    powers = [1 << i for i in range(max((row["rank"] for row in rows), default=1).bit_length())]
    # With one kind chosen there is a line for every layer: the deeper, the stronger.
    deeper = {
        "condition": {
            "test": "kind != 'all' && layer == 'all'",
            **_field("n", legend=None, scale={"domain": [0, 1], "range": [0.25, 1]}),
        },
        "value": 1,
    }
    encoding = {
        "x": _field(
            "rank",
            axis={"format": "d", "grid": False, "values": powers},
            scale={"type": "log", "base": 2, "nice": False},
        ),
        "y": _field("energy", axis={"format": ".0%", "tickCount": 5}, scale={"domain": [0, 1]}),
        "color": _hues(kinds),
        "opacity": deeper,
        "detail": _name("layer"),
        "tooltip": [_name("kind"), _name("layer"), _field("rank"), _field("energy", format=".2%")],
    }
    dash = _name("kind", legend=None, scale={"domain": [*kinds], "range": [*map(dashes, range(len(kinds)))]})
    return _chart(
        rows,
        320,
        params=[
            {"name": n, "value": "all", "bind": {"element": f"#{e}", "event": "change"}} for n, e in selects.items()
        ],
        transform=[{"filter": wanted}],
        encoding=encoding,
        layer=[
            {"mark": {"type": "line", "strokeWidth": 2, "interpolate": "monotone"}, "encoding": {"strokeDash": dash}},
            {"mark": {"type": "circle", "size": 34}},
        ],
    )


def layer_map(
    rows: Rows, layers: Sequence[str], kinds: Sequence[str], *, value: str, diverging: bool = False, top: float = 0.0
) -> Spec:
    """A map of layers by kinds.

    rows: layer, kind, value, and shown, its text. value: what it is, in words. top: the end of the scale, where it is
    not the largest value.
    """
    most = top or max((abs(row["value"]) for row in rows), default=0.0)
    limit = {"expr": "width < 260 ? 120 : 260"}
    across = {"labelAngle": 0, "labelOverlap": "greedy", **NAMES}
    encoding = {
        "x": _name("layer", type="ordinal", sort=None, axis=across, scale={"domain": [*layers]}),
        "y": _name("kind", sort=None, title=None, axis={"labelLimit": limit, **NAMES}, scale={"domain": [*kinds]}),
        "color": _steps(most, value, diverging=diverging),
        "tooltip": [_name("kind"), _name("layer"), _name("shown", title=value)],
    }
    cells = {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 1}
    return _chart(rows, max(ROW * len(kinds), 2 * ROW), mark=cells, encoding=encoding)


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], *, diverging: bool = False) -> Spec:
    """A matrix of pairs with its numbers, symmetric, on the scale from 0, or from -1, to 1."""
    labels = [f"{i + 1} {name}" for i, name in enumerate(names)]
    rows = [
        {"a": a, "b": str(u + 1), "other": b, "value": values[t][u]}
        for t, a in enumerate(labels)
        for u, b in enumerate(labels)
    ]
    low, colours = (-1, DIVERGING) if diverging else (0, SEQUENTIAL)
    strong = "abs(datum.value) > 5 / 7" if diverging else "datum.value >= 4 / 7"
    ink = {"condition": {"test": strong, "value": "var(--on-strong)"}, "value": "var(--ink)"}
    colour = _field("value", legend=None, scale={"type": "quantize", "domain": [low, 1], "range": colours})
    return _chart(
        rows,
        max(30 * len(names), 90),
        encoding={
            "x": _name("b", type="ordinal", sort=None, title=None, axis={"labelAngle": 0, **NAMES}),
            "y": _name("a", sort=None, title=None, axis={"labelLimit": 130, **NAMES}),
            "tooltip": [_name("a", title="one"), _name("other"), _field("value", format=".4f")],
        },
        layer=[
            {"mark": {"type": "rect", "stroke": "var(--paper)", "strokeWidth": 2}, "encoding": {"color": colour}},
            {
                "mark": {"type": "text", "fontSize": 12 if len(names) < 7 else 10},
                "encoding": {"text": _field("value", format=".2f"), "color": ink},
            },
        ],
    )


def budget(rows: Rows, inputs: Sequence[str], kinds: Sequence[str], norms: Mapping[str, float]) -> Spec:
    """Stacked bars of squared norms. rows: input, kind, square; norms: input to its norm, written at the end."""
    order = {kind: i for i, kind in enumerate(kinds)}
    # To the right of the longest bar its norm has room.
    room = 1.35 * max((norms[name] ** 2 for name in inputs), default=1.0)
    across = {"axis": {"tickCount": 4, "format": ".3~g"}, "scale": {"domain": [0, room], "nice": False}}
    bars = {
        "mark": {"type": "bar", "stroke": "var(--paper)", "strokeWidth": 1},
        "encoding": {
            "x": _field("square", title="squared norm of the change", **across),
            "color": _hues(kinds),
            "order": _field("order"),
            "tooltip": [_name("input"), _name("kind"), _field("square", title="squared norm", format=".4g")],
        },
    }
    ends = [{"input": name, "square": norms[name] ** 2, "text": f"norm {norms[name]:.3g}"} for name in inputs]
    words = {
        "data": {"values": ends},
        "mark": {"type": "text", "align": "left", "dx": 6, "fontSize": 12, "color": "var(--ink)"},
        "encoding": {"x": _field("square"), "text": _name("text")},
    }
    axis = {"labelLimit": 130, **NAMES}
    return _chart(
        [row | {"order": order[row["kind"]]} for row in rows],
        max(34 * len(inputs), 80),
        encoding={"y": _name("input", sort=None, title=None, axis=axis, scale={"domain": [*inputs]})},
        layer=[bars, words],
    )


def _chart(rows: Rows, height: int, **parts: Any) -> Spec:
    """As wide as its place on the page."""
    return {"data": {"values": rows}, "width": "container", "height": height, "config": CONFIG, **parts}


def _field(name: str, **options: Any) -> Spec:
    """A field of numbers."""
    return {"field": name, "type": "quantitative", **options}


def _name(name: str, **options: Any) -> Spec:
    """A field of names."""
    return {"field": name, "type": "nominal", **options}


def _hues(kinds: Sequence[str]) -> Spec:
    """A colour for each kind; the page has the legend, where it finds room on any screen."""
    return _name("kind", legend=None, scale={"domain": [*kinds], "range": [*map(hue, range(len(kinds)))]})


def _steps(most: float, title: str, *, diverging: bool) -> Spec:
    """Seven steps with round bounds, as wide as ``most`` needs; those of a fork lie around zero."""
    top = STEPS * _round_up(most / STEPS)
    domain, colours = ([-top, top], DIVERGING) if diverging else ([0, top], SEQUENTIAL)
    length = {"expr": "clamp(width, 160, 360)"}
    legend = {"type": "gradient", "title": title, "orient": "top", "format": ".3~g", "gradientLength": length}
    return _field("value", legend=legend, scale={"type": "quantize", "domain": domain, "range": colours})


def _round_up(width: float) -> float:
    """The least round number that is not below ``width``."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(f * power for f in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if f * power >= width * (1 - 1e-12))
