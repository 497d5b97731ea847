"""The figures, as Vega-Lite specifications made with Altair.

Colours are CSS variables of the page, so that a figure follows light, dark and paper without being drawn again.
Scales are in steps: a reader can match a step to the legend, and a step is one CSS variable.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import altair as alt

Spec = dict[str, Any]
Rows = list[dict[str, Any]]

STEPS = 7
SEQUENTIAL = [f"var(--step-{i})" for i in range(STEPS)]
DIVERGING = [f"var(--fork-{i})" for i in range(STEPS)]
HUES = [f"var(--hue-{i})" for i in range(8)]
DASHES = [[1, 0], [6, 3], [2, 2], [8, 2, 2, 2]]
ROW = 24  # pixels of a row of a map
FONT = "system-ui, -apple-system, 'Segoe UI', 'Liberation Sans', Arial, sans-serif"

# A screen reader is given the caption and the table; a thousand marks would only be in its way.
CONFIG: Spec = {
    "aria": False,
    "background": "transparent",
    "font": FONT,
    "view": {"stroke": None},
    "axis": {
        "labelColor": "var(--ink-2)", "titleColor": "var(--ink-2)", "gridColor": "var(--rule)",
        "domainColor": "var(--rule-2)", "tickColor": "var(--rule-2)", "titleFontWeight": "normal", "labelFontSize": 12,
        "titleFontSize": 12, "titlePadding": 8, "labelLimit": 220,
    },
    "legend": {
        "labelColor": "var(--ink)", "titleColor": "var(--ink-2)", "titleFontWeight": "normal", "labelFontSize": 12,
        "titleFontSize": 12, "labelLimit": 200, "gradientThickness": 10, "gradientStrokeColor": "var(--rule-2)",
    },
}  # fmt: skip


def energy_chart(rows: Rows, kinds: Sequence[str], *, select_kind: str, select_layer: str) -> Spec:
    """Energy against rank; the two selects of the page say which lines are shown.

    rows: layer (``all``: the kind as a whole), n (its number as 0 to 1), kind, rank, energy, first (shown at first).
    kinds: the legend's.
    """
    kind = alt.param(name="kind", value="all", bind=_bound(select_kind))
    layer = alt.param(name="layer", value="all", bind=_bound(select_layer))
    known = list(dict.fromkeys([*kinds, *(row["kind"] for row in rows)]))
    hue = alt.Scale(domain=known, range=[HUES[i % len(HUES)] for i in range(len(known))])
    dash = alt.Scale(domain=known, range=[DASHES[i // len(HUES) % len(DASHES)] for i in range(len(known))])
    wanted = (
        "kind == 'all' && layer == 'all' ? datum.first : (kind == 'all' || datum.kind == kind)"
        " && (layer == 'all' ? datum.layer != 'all' : datum.layer == layer)"
    )
    ramp = alt.condition(
        "kind != 'all' && layer == 'all'",
        alt.Opacity("n:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None),
        alt.value(1.0),
    )
    legend = alt.Legend(title=None, orient="top", values=list(kinds), columns=_columns(150), symbolType="stroke")
    shown = (
        alt.Chart(_values(rows))
        .transform_filter(wanted)
        .encode(
            x=alt.X(
                "rank:Q", scale=alt.Scale(type="log", base=2, nice=False), title="rank",
                axis=alt.Axis(format="d", grid=False, values=_powers(rows), labelFlush=True),
            ),
            y=alt.Y("energy:Q", scale=alt.Scale(domain=[0, 1]), title="energy", axis=alt.Axis(format=".0%", tickCount=5)),
            color=alt.Color("kind:N", scale=hue, sort=None, legend=legend),
            opacity=ramp,
            detail="layer:N",
            tooltip=[
                alt.Tooltip("kind:N"), alt.Tooltip("layer:N"), alt.Tooltip("rank:Q"),
                alt.Tooltip("energy:Q", format=".2%"),
            ],
        )
    )  # fmt: skip
    lines = shown.mark_line(strokeWidth=2, interpolate="monotone")
    if len(known) > len(HUES):  # hues come again, dashes tell them apart
        lines = lines.encode(strokeDash=alt.StrokeDash("kind:N", scale=dash, sort=None, legend=legend))
    points = shown.mark_circle(size=34)
    return _finished(alt.layer(lines, points).add_params(kind, layer), height=320)


def layer_map(rows: Rows, layers: Sequence[str], kinds: Sequence[str], *, value: str, diverging: bool = False) -> Spec:
    """A map of layers by kinds. rows: layer, kind, value, and shown, its text; value: what it is, in words."""
    chart = (
        alt.Chart(_values(rows))
        .mark_rect(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X(
                "layer:O", sort=None, title="layer", scale=alt.Scale(domain=list(layers)),
                axis=alt.Axis(labelAngle=0, labelOverlap="greedy", ticks=False, domain=False),
            ),
            y=alt.Y(
                "kind:N", sort=None, title=None, scale=alt.Scale(domain=list(kinds)),
                axis=alt.Axis(ticks=False, domain=False, labelLimit=alt.ExprRef("width < 420 ? 120 : 260")),
            ),
            color=_steps("value", [row["value"] for row in rows], value, diverging=diverging),
            tooltip=[alt.Tooltip("kind:N"), alt.Tooltip("layer:N"), alt.Tooltip("shown:N", title=value)],
        )
    )  # fmt: skip
    return _finished(chart, height=max(ROW * len(kinds), 2 * ROW))


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], *, diverging: bool = False) -> Spec:
    """A matrix of pairs with its numbers, symmetric, on the scale from 0, or from -1, to 1."""
    labels = [f"{i + 1} {name}" for i, name in enumerate(names)]
    rows = [
        {"a": a, "b": str(u + 1), "other": b, "value": values[t][u]}
        for t, a in enumerate(labels)
        for u, b in enumerate(labels)
    ]
    low, colours = (-1.0, DIVERGING) if diverging else (0.0, SEQUENTIAL)
    strong = "abs(datum.value) > 5 / 7" if diverging else "datum.value >= 4 / 7"
    base = alt.Chart(_values(rows)).encode(
        x=alt.X("b:O", sort=None, title=None, axis=alt.Axis(labelAngle=0, ticks=False, domain=False, orient="bottom")),
        y=alt.Y("a:N", sort=None, title=None, axis=alt.Axis(ticks=False, domain=False, labelLimit=130)),
        tooltip=[alt.Tooltip("a:N", title="one"), alt.Tooltip("other:N"), alt.Tooltip("value:Q", format=".4f")],
    )
    scale = alt.Scale(type="quantize", domain=[low, 1.0], range=colours)
    cells = base.mark_rect(stroke="var(--paper)", strokeWidth=2).encode(
        color=alt.Color("value:Q", scale=scale, legend=None)
    )
    numbers = base.mark_text(fontSize=12 if len(names) < 7 else 10).encode(
        text=alt.Text("value:Q", format=".2f"),
        color=alt.condition(strong, alt.value("var(--on-strong)"), alt.value("var(--ink)")),
    )
    return _finished(alt.layer(cells, numbers).resolve_scale(color="independent"), height=max(30 * len(names), 90))


def budget(rows: Rows, inputs: Sequence[str], kinds: Sequence[str], norms: Mapping[str, float]) -> Spec:
    """Stacked bars of squared norms. rows: input, kind, square; norms: input to its norm, written at the end."""
    hue = alt.Scale(domain=list(kinds), range=[HUES[i % len(HUES)] for i in range(len(kinds))])
    y = alt.Y("input:N", sort=None, title=None, scale=alt.Scale(domain=list(inputs)), axis=alt.Axis(ticks=False, domain=False, labelLimit=130))  # fmt: skip
    # To the right of the longest bar its norm has room.
    room = alt.Scale(domain=[0, 1.3 * max((norms[name] ** 2 for name in inputs), default=1.0)], nice=False)
    order = {kind: i for i, kind in enumerate(kinds)}
    bars = (
        alt.Chart(_values([row | {"order": order[row["kind"]]} for row in rows]))
        .mark_bar(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("square:Q", title="squared norm of the change", scale=room, axis=alt.Axis(tickCount=4, format=".3~g")),
            y=y,
            color=alt.Color("kind:N", scale=hue, sort=None, legend=alt.Legend(title=None, orient="top", columns=_columns(150), symbolType="square")),
            order=alt.Order("order:Q"),
            tooltip=[
                alt.Tooltip("input:N"), alt.Tooltip("kind:N"), alt.Tooltip("square:Q", title="squared norm", format=".4g"),
            ],
        )
    )  # fmt: skip
    ends = [{"input": name, "square": norms[name] ** 2, "text": f"norm {norms[name]:.3g}"} for name in inputs]
    texts = (
        alt.Chart(_values(ends))
        .mark_text(align="left", dx=6, fontSize=12, color="var(--ink)")
        .encode(x="square:Q", y=y, text="text:N")
    )
    return _finished(alt.layer(bars, texts), height=max(34 * len(inputs), 80))


def _steps(field: str, values: Iterable[float], title: str, *, diverging: bool) -> alt.Color:
    """Seven steps of a round width each, as many as the values need."""
    most = max(map(abs, values), default=0.0)
    top = _round_up(most / (STEPS / 2 if diverging else STEPS)) * (STEPS / 2 if diverging else STEPS)
    domain, colours = ([-top, top], DIVERGING) if diverging else ([0.0, top], SEQUENTIAL)
    scale = alt.Scale(type="quantize", domain=domain, range=colours)
    length = alt.ExprRef("clamp(width, 160, 360)")
    return alt.Color(
        f"{field}:Q", scale=scale, legend=alt.Legend(title=title, orient="top", format=".3~g", gradientLength=length)
    )


def _round_up(width: float) -> float:
    """The least round number that is not below ``width``."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(f * power for f in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if f * power >= width * (1 - 1e-12))


def _finished(chart: Any, *, height: int) -> Spec:
    return chart.properties(width="container", height=height).configure(**CONFIG).to_dict()


def _powers(rows: Rows) -> list[int]:
    """Powers of two up to the largest rank."""
    return [1 << i for i in range(max((row["rank"] for row in rows), default=1).bit_length())]


def _values(rows: Rows) -> alt.Data:
    return alt.Data(values=rows)


def _bound(element: str) -> dict[str, str]:
    """A select of the page, in which Vega sees every choice."""
    return {"element": f"#{element}", "event": "change"}


def _columns(pixels: int) -> Any:
    """So many columns of a legend as have room."""
    return alt.ExprRef(f"max(1, floor(width / {pixels}))")
