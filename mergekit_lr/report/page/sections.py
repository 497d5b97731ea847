"""What stands on the page in which order: sections of figures, and every figure's numbers as a table."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_lr.report.page import charts
from mergekit_lr.report.page.content import Cell, Content
from mergekit_lr.report.page.curves import ALL, Curve, curves_of
from mergekit_lr.report.page.manifests import ComparedModule, Comparison
from mergekit_lr.report.page.places import OUTSIDE, Place, kinds_of, layers_of, places_of, short
from mergekit_lr.report.quantities import percent

LINES = 12  # kinds that have a line at first, those of the largest changes
BARS = 7  # kinds with a colour of their own in the norm budget
WORST = 10  # modules in the table of the largest errors


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


@dataclass(frozen=True)
class Figure:
    """A chart with its words. marks: how many lines, cells or bars it draws at first. spec: Vega-Lite."""

    id: str
    title: str
    caption: str
    marks: int
    spec: charts.Spec
    table: Table | None = None
    selects: tuple[Select, ...] = ()


@dataclass(frozen=True)
class Section:
    """A part of the page. small: its figures stand side by side where there is room."""

    id: str
    title: str
    text: str
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    small: bool = False


def sections_of(content: Content) -> list[Section]:
    """All sections for which there are figures."""
    found = [_energy(content.cells), _losses(content), _changes(content)]
    if content.comparison is not None:
        names = content.comparison.names
        found += [_pairs(content.comparison), _maps(content.comparison), _budget(content.comparison, content.cells)]
        assert len(names) > 1
    found.append(_modules(content))
    return [section for section in found if section is not None]


def _energy(cells: Sequence[Cell]) -> Section | None:
    curves = curves_of(cells)
    if not curves:
        return None
    layers = layers_of(cell.place for cell in cells)
    number = {layer: i / max(len(layers) - 1, 1) for i, layer in enumerate([*layers])}
    whole = sorted((c for c in curves if c.layer == ALL), key=lambda curve: -curve.squared_norm)
    first = {curve.kind for curve in whole[:LINES]}
    kinds = [curve.kind for curve in curves if curve.layer == ALL]
    names = short(kinds)
    rows = [
        {
            "layer": curve.layer, "n": round(number.get(curve.layer, 1.0), 3), "kind": names[curve.kind],
            "rank": rank, "energy": round(energy, 4), "first": curve.layer == ALL and curve.kind in first,
        }
        for curve in curves
        for rank, energy in curve.points
    ]  # fmt: skip
    selects = (
        Select("energy-kind", "Kind", (("all", "all"), *((names[kind], kind) for kind in kinds))),
        Select("energy-layer", "Layer", (("all", "all"), *((layer, _layer(layer)) for layer in layers))),
    )
    shown = [names[kind] for kind in kinds if kind in first]
    figure = Figure(
        "energy-chart",
        "Energy against rank",
        "Share of the squared norm of the change that its first r singular directions hold, for each kind of module "
        "over all layers. Choose a kind for a line per layer, the stronger the deeper; choose a layer for its kinds."
        + (f" At first the {LINES} kinds with the largest changes are shown." if len(kinds) > LINES else ""),
        len(first),
        charts.energy_chart(rows, shown, select_kind="energy-kind", select_layer="energy-layer"),
        _energies([c for c in curves if c.layer == ALL], "Energy by kind and rank, all layers together"),
        selects,
    )
    return Section("energy", figure.title, "", (figure,))


def _energies(curves: Sequence[Curve], caption: str) -> Table:
    """One row for each curve, one column for each power of two and the largest rank."""
    most = max(rank for curve in curves for rank, _ in curve.points)
    ranks = sorted({1 << i for i in range(most.bit_length())} | {most})
    rows = tuple((c.kind, *(_share(c.at(rank)) for rank in ranks)) for c in curves)
    return Table(caption, ("kind", *(f"r = {rank}" for rank in ranks)), rows)


def _losses(content: Content) -> Section | None:
    cells = [cell for cell in content.cells if cell.squared_norm]
    if not cells:
        return None
    if not any(cell.error for cell in cells):
        return Section("errors", "Error by layer and kind", f"Nothing was lost by {content.lost_by}.")
    figure = _map(
        "error-map", "Error by layer and kind",
        f"What {content.lost_by} lost of each module's change: Frobenius norm, relative to that of the change.",
        [(cell.place, cell.error) for cell in cells], "relative error", lambda v: f"{v:.4f}",
    )  # fmt: skip
    worst = sorted(((c.error, m.name, m.rank, c.norm) for c in cells for m in c.modules[:1]), reverse=True)[:WORST]
    ranked = any(rank is not None for _, _, rank, _ in worst)
    table = Table(
        f"The {len(worst)} modules with the largest error",
        ("module", *(("rank",) if ranked else ()), "norm of the change", "error"),
        tuple(
            (name.removesuffix(".weight"), *((str(rank),) if ranked else ()), f"{norm:.4g}", f"{error:.4f}")
            for error, name, rank, norm in worst
        ),
    )
    return Section("errors", "Error by layer and kind", "", (figure,), (table,))


def _changes(content: Content) -> Section | None:
    cells = [cell for cell in content.cells if cell.squared_norm]
    if not cells:
        return None
    figure = _map(
        "change-map", "Where the model changes",
        "Frobenius norm of the change of each module, before anything of it is lost.",
        [(cell.place, cell.norm) for cell in cells], "norm of the change", lambda v: f"{v:.4g}",
    )  # fmt: skip
    return Section("change", "Where the model changes", "", (figure,))


def _pairs(comparison: Comparison) -> Section:
    names = comparison.names
    panels = (
        ("cosine", "Cosine", "Whether whole changes point the same way, -1 to 1.", comparison.cosine, True),
        ("opposite", "Sign conflict", "Share of entries that are changed in opposite directions.", comparison.opposite, False),
        ("output", "Overlap of output directions", "Mean squared cosine of the angles between left singular spaces.", comparison.output, False),
        ("input", "Overlap of input directions", "The same of right singular spaces.", comparison.input, False),
    )  # fmt: skip
    figures = tuple(
        Figure(
            f"pairs-{key}", title, caption, len(names) ** 2, charts.matrix(names, values, diverging=diverging),
            Table(
                f"{title} of each pair", ("", *names),
                tuple((name, *(f"{v:.4f}" for v in row)) for name, row in zip(names, values, strict=True)),
            ),
        )
        for key, title, caption, values, diverging in panels
    )  # fmt: skip
    text = "Means over modules, weighted by the norms of the two; columns have the numbers of the rows."
    return Section("pairs", "Inputs against each other", text, figures, small=True)


def _maps(comparison: Comparison) -> Section:
    places = places_of([module.name for module in comparison.modules])
    panels: tuple[tuple[str, str, str, Callable[[ComparedModule], float], bool], ...] = (
        ("interference", "Interference", "Singular task interference (arXiv 2412.00081): 0 where the inputs use "
         "orthogonal directions, the larger the more they write over each other.", lambda m: m.interference, False),
        ("signs", "Sign conflict", "Share of entries with opposite signs, mean over pairs.", lambda m: _mean(m.opposite), False),
        ("overlap", "Overlap of directions", "Mean of the overlaps of output and input directions, over pairs.",
         lambda m: (_mean(m.output) + _mean(m.input)) / 2, False),
        ("cosine", "Cosine", "Of the changes, mean over pairs.", _mean_cosine, True),
    )  # fmt: skip
    figures = tuple(
        _map(f"{key}-map", title, caption, [(p, of(m)) for p, m in zip(places, comparison.modules, strict=True)],
             title.lower(), lambda v: f"{v:.3f}", diverging=diverging)
        for key, title, caption, of, diverging in panels
    )  # fmt: skip
    text = "Where in the model the inputs meet, for every module that at least two of them change."
    return Section("maps", "Where the inputs meet", text, figures)


def _budget(comparison: Comparison, cells: Sequence[Cell]) -> Section:
    """Squared norms by input and kind, and of the merge itself where there is one."""
    squares: dict[str, dict[str, float]] = {name: {} for name in comparison.names}
    for place, module in zip(places_of([m.name for m in comparison.modules]), comparison.modules, strict=True):
        for task, norm in zip(module.tasks, module.norms, strict=True):
            held = squares[comparison.names[task]]
            held[place.kind] = held.get(place.kind, 0.0) + norm * norm
    for name, norm in zip(comparison.names, comparison.norms, strict=True):
        rest = norm * norm - sum(squares[name].values())
        if rest > 1e-6 * norm * norm:
            squares[name]["not shared"] = rest
    if cells:
        merged: dict[str, float] = {}
        for cell in cells:
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
    figure = Figure(
        "budget-chart", "Norm budget",
        "Squared norm of each input's change by kind of module; squares add up, the norm stands at the end. An input "
        "with a much longer bar drowns the others unless weights balance it.",
        len(rows), charts.budget(rows, list(squares), groups, norms),
        Table(
            "Squared norm by input and kind", ("input", *groups, "norm"),
            tuple(
                (name, *(f"{summed.get((name, g), 0.0):.4g}" for g in groups), f"{norms[name]:.4g}") for name in squares
            ),
        ),
    )  # fmt: skip
    return Section("budget", "Norm budget", "", (figure,))


def _modules(content: Content) -> Section | None:
    """Every cell with all that is known of it: the page without figures."""
    if not content.cells:
        return None
    curves = {Place(c.layer, c.kind): c for c in curves_of(content.cells) if c.layer != ALL}
    most = max((rank for curve in curves.values() for rank, _ in curve.points), default=0)
    ranks = sorted({1 << i for i in range(most.bit_length())})
    several = any(len(cell.modules) > 1 for cell in content.cells)
    ranked = any(cell.modules[0].rank is not None for cell in content.cells)
    rows = []
    for cell in content.cells:
        first, curve = cell.modules[0], curves.get(cell.place)
        row = [cell.place.kind, _layer(cell.place.layer), "x".join(map(str, first.shape))]
        row += [str(len(cell.modules))] if several else []
        row += [_range([m.rank for m in cell.modules if m.rank is not None])] if ranked else []
        row += [f"{cell.norm:.4g}", f"{cell.error:.4f}"]
        rows.append((*row, *(_share(curve.at(rank) if curve else None) for rank in ranks)))
    columns = ("kind", "layer", "shape", *(("modules",) if several else ()), *(("rank",) if ranked else ()))
    columns += ("norm", "error", *(f"r = {rank}" for rank in ranks))
    note = "; the last columns are the energy at that rank" if ranks else ""
    table = Table(f"All {len(content.cells)} modules{note}", columns, tuple(rows), heads=2)
    return Section("modules", "All modules", "", tables=(table,))


def _map(
    id: str, title: str, caption: str, values: Iterable[tuple[Place, float]], value: str,
    written: Callable[[float], str], *, diverging: bool = False,
) -> Figure:  # fmt: skip
    """A map of layers by kinds; of modules in one cell the mean."""
    groups: dict[Place, list[float]] = {}
    for place, number in values:
        groups.setdefault(place, []).append(number)
    held = {place: sum(numbers) / len(numbers) for place, numbers in groups.items()}
    layers, kinds = layers_of(held), kinds_of(held)
    names = short(kinds)
    rows: list[dict[str, Any]] = [
        {"layer": p.layer, "kind": names[p.kind], "value": float(f"{v:.5g}"), "shown": written(v)} for p, v in held.items()
    ]  # fmt: skip
    lines = tuple(
        (_layer(layer), *(written(held[p]) if (p := Place(layer, kind)) in held else "" for kind in kinds))
        for layer in layers
    )
    if OUTSIDE in layers:
        caption += f" {OUTSIDE} is what stands outside of the layers."
    spec = charts.layer_map(rows, layers, [names[kind] for kind in kinds], value=value, diverging=diverging)
    return Figure(id, title, caption, len(held), spec, Table(title, ("layer", *(names[k] for k in kinds)), lines))


def _mean(matrix: Sequence[Sequence[float]]) -> float:
    """Of all pairs."""
    pairs = [matrix[t][u] for t in range(len(matrix)) for u in range(t)]
    return sum(pairs) / max(len(pairs), 1)


def _mean_cosine(module: ComparedModule) -> float:
    norms = module.norms
    count = range(len(norms))
    return _mean([[module.inner[t][u] / (norms[t] * norms[u]) if norms[t] * norms[u] else 0.0 for u in count] for t in count])  # fmt: skip


def _layer(layer: str) -> str:
    return "outside" if layer == OUTSIDE else layer


def _share(energy: float | None) -> str:
    return "" if energy is None else percent(energy)


def _range(ranks: Sequence[int]) -> str:
    return "" if not ranks else str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"
