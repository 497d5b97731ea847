"""The sections about a result itself: how fast its energy grows with the rank, where it changes, what was lost."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.report.page import charts
from mergekit_lr.report.page.content import Cell, Content
from mergekit_lr.report.page.curves import ALL, Curve, curves_of
from mergekit_lr.report.page.inputs import sections_of_inputs
from mergekit_lr.report.page.parts import Figure, Section, Select, Table, layer_figure, layer_name, legend
from mergekit_lr.report.page.places import Place, layers_of, short
from mergekit_lr.report.quantities import percent

LINES = 12  # kinds that have a line at first, those of the largest changes
WORST = 10  # modules in the table of the largest errors


def sections_of(content: Content) -> list[Section]:
    """All sections for which there is something to show."""
    sections = [_energy(content.cells), _maps(content)]
    if content.comparison is not None:
        sections += sections_of_inputs(content.comparison, content.cells)
    sections.append(_modules(content.cells))
    return [section for section in sections if section is not None]


def _energy(cells: Sequence[Cell]) -> Section | None:
    curves = curves_of(cells)
    if not curves:
        return None
    layers = layers_of(cell.place for cell in cells)
    depth = {layer: i / max(len(layers) - 1, 1) for i, layer in enumerate(layers)}
    whole = [curve for curve in curves if curve.layer == ALL]
    first = {curve.kind for curve in sorted(whole, key=lambda curve: -curve.squared_norm)[:LINES]}
    names = short([curve.kind for curve in whole])
    rows = [
        {
            "layer": curve.layer,
            "n": round(depth.get(curve.layer, 1.0), 3),
            "kind": names[curve.kind],
            "rank": rank,
            "energy": round(energy, 4),
            "first": curve.layer == ALL and curve.kind in first,
        }
        for curve in curves
        for rank, energy in curve.points
    ]
    selects = (
        Select("energy-kind", "Kind", (("all", "all"), *((names[c.kind], c.kind) for c in whole))),
        Select("energy-layer", "Layer", (("all", "all"), *((layer, layer_name(layer)) for layer in layers))),
    )
    caption = (
        "Share of the squared norm of the change that its first r singular directions hold, for each kind of module "
        "over all layers. A steep curve means that a low rank is enough. Choose a kind for a line per layer, the "
        "stronger the deeper; choose a layer for its kinds."
    )
    if len(whole) > LINES:
        caption += f" At first the {LINES} kinds with the largest changes are shown."
    kinds = [names[curve.kind] for curve in whole]
    spec = charts.energy_chart(rows, kinds, select_kind="energy-kind", select_layer="energy-layer")
    title = "Energy against rank"
    keys = legend(kinds, shown={names[kind] for kind in first})
    figure = Figure("energy-chart", title, caption, len(first), spec, _energies(whole), selects, keys)
    return Section("energy", title, figures=(figure,))


def _energies(curves: Sequence[Curve]) -> Table:
    """One row for each kind, one column for each power of two and the largest rank."""
    most = max(rank for curve in curves for rank, _ in curve.points)
    ranks = sorted({1 << i for i in range(most.bit_length())} | {most})
    rows = tuple((curve.kind, *(_share(curve, rank) for rank in ranks)) for curve in curves)
    columns = ("kind", *(f"r = {rank}" for rank in ranks))
    return Table("Energy by kind and rank, all layers together", columns, rows)


def _maps(content: Content) -> Section | None:
    """Where the change is, and what of it was lost."""
    cells = [cell for cell in content.cells if cell.squared_norm]
    if not cells:
        return None
    figures = [
        layer_figure(
            "change-map",
            "Norm of the change",
            "Frobenius norm of what each module is changed by, before anything of it is lost.",
            [(cell.place, cell.norm) for cell in cells],
            value="norm of the change",
            written=lambda value: f"{value:.4g}",
        )
    ]
    tables = []
    if any(cell.error for cell in cells):
        errors = layer_figure(
            "error-map",
            "Error",
            f"What {content.lost_by} lost of each module's change, relative to the norm of that change.",
            [(cell.place, cell.error) for cell in cells],
            value="relative error",
            written=lambda value: f"{value:.4f}",
        )
        figures, tables = [errors, *figures], [_worst(cells)]
    text = "" if tables else f"Nothing was lost by {content.lost_by}."
    return Section("maps", "By layer and kind", text, tuple(figures), tuple(tables))


def _worst(cells: Sequence[Cell]) -> Table:
    worst = sorted(cells, key=lambda cell: -cell.error)[:WORST]
    ranked = any(cell.modules[0].rank is not None for cell in worst)
    rows = tuple(
        (
            cell.modules[0].name.removesuffix(".weight"),
            *((_ranks(cell),) if ranked else ()),
            f"{cell.norm:.4g}",
            f"{cell.error:.4f}",
        )
        for cell in worst
    )
    columns = ("module", *(("rank",) if ranked else ()), "norm of the change", "error")
    return Table(f"The {len(worst)} modules with the largest error", columns, rows)


def _modules(cells: Sequence[Cell]) -> Section | None:
    """Every cell with all that is known of it: the page without figures."""
    if not cells:
        return None
    curves = {Place(curve.layer, curve.kind): curve for curve in curves_of(cells)}
    most = max((rank for curve in curves.values() for rank, _ in curve.points), default=0)
    ranks = [1 << i for i in range(most.bit_length())]
    several = any(len(cell.modules) > 1 for cell in cells)
    ranked = any(cell.modules[0].rank is not None for cell in cells)
    rows = tuple(
        (
            cell.place.kind,
            layer_name(cell.place.layer),
            "x".join(map(str, cell.modules[0].shape)),
            *((str(len(cell.modules)),) if several else ()),
            *((_ranks(cell),) if ranked else ()),
            f"{cell.norm:.4g}",
            f"{cell.error:.4f}",
            *(_share(curves.get(cell.place), rank) for rank in ranks),
        )
        for cell in cells
    )
    columns = ("kind", "layer", "shape", *(("modules",) if several else ()), *(("rank",) if ranked else ()))
    columns += ("norm", "error", *(f"r = {rank}" for rank in ranks))
    note = "; the last columns are the energy at that rank" if ranks else ""
    count = sum(len(cell.modules) for cell in cells)
    return Section("modules", "All modules", tables=(Table(f"All {count} modules{note}", columns, rows, heads=2),))


def _share(curve: Curve | None, rank: int) -> str:
    energy = curve.at(rank) if curve is not None else None
    return "" if energy is None else percent(energy)


def _ranks(cell: Cell) -> str:
    ranks = [module.rank for module in cell.modules if module.rank is not None]
    if not ranks:
        return ""
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"
