"""The sections about the inputs of a merge, or about adapters that are compared: pairs, maps, norms."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import NamedTuple

from mergekit_lr.report.page import charts
from mergekit_lr.report.page.content import Cell
from mergekit_lr.report.page.manifests import ComparedModule, Comparison
from mergekit_lr.report.page.parts import Figure, Section, Table, layer_figure, legend
from mergekit_lr.report.page.places import places_of, short

BARS = 7  # kinds with a colour of their own in the norm budget
# Ends of the scales of shares: seven steps of 0.15.
SHARE = 1.05


class Measure(NamedTuple):
    """What is shown of every module. top: the end of its scale, 0 for that of the largest value."""

    id: str
    title: str
    caption: str
    of: Callable[[ComparedModule], float]
    top: float = 0.0
    diverging: bool = False


def sections_of_inputs(comparison: Comparison, cells: Sequence[Cell]) -> list[Section]:
    """The sections of a comparison; cells: of the merge, whose norms stand beside those of its inputs."""
    return [_pairs(comparison), _budget(comparison, cells), _maps(comparison)]


def _pairs(comparison: Comparison) -> Section:
    names = comparison.names
    panels = (
        ("cosine", "Cosine", "Whether the whole changes point the same way, -1 to 1."),
        ("opposite", "Sign conflict", "Share of entries that are changed in opposite directions."),
        ("output", "Overlap of output directions", "Mean squared cosine of the angles between left singular spaces."),
        ("input", "Overlap of input directions", "The same between right singular spaces."),
    )
    figures = []
    for key, title, caption in panels:
        values = getattr(comparison, key)
        rows = tuple((name, *(f"{v:.4f}" for v in row)) for name, row in zip(names, values, strict=True))
        spec = charts.matrix(names, values, diverging=key == "cosine")
        table = Table(f"{title} of each pair", ("", *names), rows)
        figures.append(Figure(f"pairs-{key}", title, caption, len(names) ** 2, spec, table, small=True))
    text = "Means over modules, weighted by the norms of the two; a column has the number of its row."
    return Section("pairs", "Inputs against each other", text, tuple(figures), notes=tuple(comparison.hints))


def _maps(comparison: Comparison) -> Section:
    measures = (
        Measure(
            "interference",
            "Interference",
            "Singular task interference (arXiv 2412.00081): 0 where the inputs use orthogonal directions, the larger "
            "the more they write over each other.",
            lambda m: m.interference,
        ),
        Measure("signs", "Sign conflict", "Share of entries with opposite signs.", lambda m: _mean(m.opposite), SHARE),
        Measure(
            "output", "Overlap of output directions", "What the inputs write to.", lambda m: _mean(m.output), SHARE
        ),
        Measure("input", "Overlap of input directions", "What the inputs read from.", lambda m: _mean(m.input), SHARE),
        Measure("cosine", "Cosine", "Whether the changes point the same way.", _cosine, diverging=True),
    )
    places = places_of([module.name for module in comparison.modules])
    figures = [
        layer_figure(
            f"{measure.id}-map",
            measure.title,
            measure.caption + ("" if measure.id == "interference" else " Mean over pairs."),
            [(place, measure.of(module)) for place, module in zip(places, comparison.modules, strict=True)],
            value=measure.title.lower(),
            written=lambda value: f"{value:.3f}",
            diverging=measure.diverging,
            top=measure.top,
        )
        for measure in measures
    ]
    # The first stands alone, the others in pairs.
    figures[0] = replace(figures[0], small=False)
    text = "Measured in every module that at least two of them change."
    return Section("meet", "Where the inputs meet", text, tuple(figures))


def _budget(comparison: Comparison, cells: Sequence[Cell]) -> Section:
    """Squared norms by input and kind, and of the merge itself where there is one."""
    squares = _squares(comparison)
    if cells:
        merged: dict[str, float] = {}
        for cell in (cell for cell in cells if cell.squared_norm):
            merged[cell.place.kind] = merged.get(cell.place.kind, 0.0) + cell.squared_norm
        squares["merged"] = merged
    kinds = list(dict.fromkeys(kind for held in squares.values() for kind in held))
    names = short(kinds)
    largest = sorted(kinds, key=lambda kind: -sum(held.get(kind, 0.0) for held in squares.values()))[:BARS]
    groups = [names[kind] for kind in kinds if kind in largest] + (["others"] if len(kinds) > BARS else [])
    summed: dict[tuple[str, str], float] = {}
    for name, held in squares.items():
        for kind, square in held.items():
            key = (name, names[kind] if kind in largest else "others")
            summed[key] = summed.get(key, 0.0) + square
    norms = {name: sum(held.values()) ** 0.5 for name, held in squares.items()}
    rows = [{"input": name, "kind": kind, "square": square} for (name, kind), square in summed.items()]
    caption = (
        "Squared norm of each input's change by kind of module; squares add up, and the norm stands at the end. An "
        "input with a much longer bar drowns the others unless weights balance it."
    )
    table = Table(
        "Squared norm by input and kind",
        ("input", *groups, "norm"),
        tuple((name, *(f"{summed.get((name, g), 0.0):.4g}" for g in groups), f"{norms[name]:.4g}") for name in squares),
    )
    title, spec = "Norm budget", charts.budget(rows, list(squares), groups, norms)
    figure = Figure("budget-chart", title, caption, len(rows), spec, table, legend=legend(groups))
    return Section("budget", title, figures=(figure,))


def _squares(comparison: Comparison) -> dict[str, dict[str, float]]:
    """Input to kind to squared norm; what is in no compared module is ``rest``."""
    squares: dict[str, dict[str, float]] = {name: {} for name in comparison.names}
    places = places_of([module.name for module in comparison.modules])
    for place, module in zip(places, comparison.modules, strict=True):
        for task, norm in zip(module.tasks, module.norms, strict=True):
            held = squares[comparison.names[task]]
            held[place.kind] = held.get(place.kind, 0.0) + norm * norm
    for name, norm in zip(comparison.names, comparison.norms, strict=True):
        rest = norm * norm - sum(squares[name].values())
        if rest > 1e-6 * norm * norm:
            squares[name]["rest"] = rest
    return squares


def _mean(matrix: Sequence[Sequence[float]]) -> float:
    """Of all pairs."""
    pairs = [matrix[t][u] for t in range(len(matrix)) for u in range(t)]
    return sum(pairs) / max(len(pairs), 1)


def _cosine(module: ComparedModule) -> float:
    """Mean over pairs."""
    tasks, norms = range(len(module.norms)), module.norms
    product = [[norms[t] * norms[u] for u in tasks] for t in tasks]
    return _mean([[module.inner[t][u] / product[t][u] if product[t][u] else 0.0 for u in tasks] for t in tasks])
