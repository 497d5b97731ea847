"""The figures, as Vega-Lite specifications made with Altair.

Colours are CSS variables of the page, so that a figure follows light, dark and paper without being drawn again.
Scales are in steps: a reader can match a step to the legend, and a step is one CSS variable.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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
BARE = {"ticks": False, "domain": False}  # an axis of names


def energy_chart(rows: Rows, kinds: Sequence[str], *, select_kind: str, select_layer: str) -> Spec:
    """Energy against rank; the two selects of the page say which lines are shown.

    rows: layer (``all``: the kind as a whole), n (its number as 0 to 1), kind, rank, energy, first (shown at first).
    kinds: the legend's.
    """
    import altair as alt

    # Vega sees every choice in a select that is part of the page.
    kind = alt.param(name="kind", value="all", bind={"element": f"#{select_kind}", "event": "change"})
    layer = alt.param(name="layer", value="all", bind={"element": f"#{select_layer}", "event": "change"})
    wanted = (
        "kind == 'all' && layer == 'all' ? datum.first : (kind == 'all' || datum.kind == kind)"
        " && (layer == 'all' ? datum.layer != 'all' : datum.layer == layer)"
    )
    deeper = alt.Opacity("n:Q", scale=alt.Scale(domain=[0, 1], range=[0.25, 1]), legend=None)
    known = list(dict.fromkeys([*kinds, *(row["kind"] for row in rows)]))
    hue = alt.Scale(domain=known, range=[HUES[i % len(HUES)] for i in range(len(known))])
    dash = alt.Scale(domain=known, range=[DASHES[i // len(HUES) % len(DASHES)] for i in range(len(known))])
    legend = alt.Legend(title=None, orient="top", values=list(kinds), columns=_columns(), symbolType="stroke")
    powers = [1 << i for i in range(max((row["rank"] for row in rows), default=1).bit_length())]
    share = alt.Axis(format=".0%", tickCount=5)
    shown = (
        alt.Chart(alt.Data(values=rows))
        .transform_filter(wanted)
        .encode(
            x=alt.X("rank:Q", title="rank", axis=alt.Axis(format="d", grid=False, values=powers))
            .scale(type="log", base=2, nice=False),
            y=alt.Y("energy:Q", title="energy", axis=share).scale(domain=[0, 1]),
            color=alt.Color("kind:N", scale=hue, sort=None, legend=legend),
            opacity=alt.condition("kind != 'all' && layer == 'all'", deeper, alt.value(1.0)),
            detail="layer:N",
            tooltip=["kind:N", "layer:N", "rank:Q", alt.Tooltip("energy:Q", format=".2%")],
        )
    )  # fmt: skip
    lines = shown.mark_line(strokeWidth=2, interpolate="monotone")
    if len(known) > len(HUES):  # hues come again, dashes tell them apart
        lines = lines.encode(strokeDash=alt.StrokeDash("kind:N", scale=dash, sort=None, legend=legend))
    return _finished(alt.layer(lines, shown.mark_circle(size=34)).add_params(kind, layer), height=320)


def layer_map(
    rows: Rows, layers: Sequence[str], kinds: Sequence[str], *, value: str, diverging: bool = False, top: float = 0.0
) -> Spec:
    """A map of layers by kinds.

    rows: layer, kind, value, and shown, its text. value: what it is, in words. top: the end of the scale, where it is
    not the largest value.
    """
    import altair as alt

    limit = alt.ExprRef("width < 420 ? 120 : 260")
    most = top or max((abs(row["value"]) for row in rows), default=0.0)
    chart = (
        alt.Chart(alt.Data(values=rows))
        .mark_rect(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=alt.X("layer:O", sort=None, title="layer", axis=alt.Axis(labelAngle=0, labelOverlap="greedy", **BARE))
            .scale(domain=list(layers)),
            y=alt.Y("kind:N", sort=None, title=None, axis=alt.Axis(labelLimit=limit, **BARE))
            .scale(domain=list(kinds)),
            color=_steps(most, value, diverging=diverging),
            tooltip=["kind:N", "layer:N", alt.Tooltip("shown:N", title=value)],
        )
    )  # fmt: skip
    return _finished(chart, height=max(ROW * len(kinds), 2 * ROW))


def matrix(names: Sequence[str], values: Sequence[Sequence[float]], *, diverging: bool = False) -> Spec:
    """A matrix of pairs with its numbers, symmetric, on the scale from 0, or from -1, to 1."""
    import altair as alt

    labels = [f"{i + 1} {name}" for i, name in enumerate(names)]
    rows = [
        {"a": a, "b": str(u + 1), "other": b, "value": values[t][u]}
        for t, a in enumerate(labels)
        for u, b in enumerate(labels)
    ]
    low, colours = (-1.0, DIVERGING) if diverging else (0.0, SEQUENTIAL)
    strong = "abs(datum.value) > 5 / 7" if diverging else "datum.value >= 4 / 7"
    base = alt.Chart(alt.Data(values=rows)).encode(
        x=alt.X("b:O", sort=None, title=None, axis=alt.Axis(labelAngle=0, **BARE)),
        y=alt.Y("a:N", sort=None, title=None, axis=alt.Axis(labelLimit=130, **BARE)),
        tooltip=[alt.Tooltip("a:N", title="one"), "other:N", alt.Tooltip("value:Q", format=".4f")],
    )
    colour = alt.Color("value:Q", legend=None).scale(type="quantize", domain=[low, 1.0], range=colours)
    cells = base.mark_rect(stroke="var(--paper)", strokeWidth=2).encode(color=colour)
    numbers = base.mark_text(fontSize=12 if len(names) < 7 else 10).encode(
        text=alt.Text("value:Q", format=".2f"),
        color=alt.condition(strong, alt.value("var(--on-strong)"), alt.value("var(--ink)")),
    )
    return _finished(alt.layer(cells, numbers).resolve_scale(color="independent"), height=max(30 * len(names), 90))


def budget(rows: Rows, inputs: Sequence[str], kinds: Sequence[str], norms: Mapping[str, float]) -> Spec:
    """Stacked bars of squared norms. rows: input, kind, square; norms: input to its norm, written at the end."""
    import altair as alt

    hue = alt.Scale(domain=list(kinds), range=[HUES[i % len(HUES)] for i in range(len(kinds))])
    legend = alt.Legend(title=None, orient="top", columns=_columns(), symbolType="square")
    order = {kind: i for i, kind in enumerate(kinds)}
    y = alt.Y("input:N", sort=None, title=None, axis=alt.Axis(labelLimit=130, **BARE)).scale(domain=list(inputs))
    squares = alt.X("square:Q", title="squared norm of the change", axis=alt.Axis(tickCount=4, format=".3~g"))
    # To the right of the longest bar its norm has room.
    room = 1.35 * max((norms[name] ** 2 for name in inputs), default=1.0)
    square = alt.Tooltip("square:Q", title="squared norm", format=".4g")
    bars = (
        alt.Chart(alt.Data(values=[row | {"order": order[row["kind"]]} for row in rows]))
        .mark_bar(stroke="var(--paper)", strokeWidth=1)
        .encode(
            x=squares.scale(domain=[0, room], nice=False),
            y=y,
            color=alt.Color("kind:N", scale=hue, sort=None, legend=legend),
            order="order:Q",
            tooltip=["input:N", "kind:N", square],
        )
    )
    ends = [{"input": name, "square": norms[name] ** 2, "text": f"norm {norms[name]:.3g}"} for name in inputs]
    words = alt.Chart(alt.Data(values=ends)).mark_text(align="left", dx=6, fontSize=12, color="var(--ink)")
    return _finished(alt.layer(bars, words.encode(x="square:Q", y=y, text="text:N")), height=max(34 * len(inputs), 80))


def _steps(most: float, title: str, *, diverging: bool) -> alt.Color:
    """Seven steps with round bounds, as wide as ``most`` needs; those of a fork lie around zero."""
    import altair as alt

    width = _round_up(most / STEPS)
    top = STEPS * width
    domain, colours = ([-top, top], DIVERGING) if diverging else ([0.0, top], SEQUENTIAL)
    length = alt.ExprRef("clamp(width, 160, 360)")
    legend = alt.Legend(type="gradient", title=title, orient="top", format=".3~g", gradientLength=length)
    return alt.Color("value:Q", legend=legend).scale(type="quantize", domain=domain, range=colours)


def _round_up(width: float) -> float:
    """The least round number that is not below ``width``."""
    if width <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(width))
    return next(f * power for f in (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if f * power >= width * (1 - 1e-12))


def _columns() -> Any:
    """So many columns of a legend as have room."""
    import altair as alt

    return alt.ExprRef("max(1, floor(width / 150))")


def _finished(chart: Any, *, height: int) -> Spec:
    return chart.properties(width="container", height=height).configure(**CONFIG).to_dict()
