"""``lrmerge compare A B ...``: how alike adapters are, and where they interfere."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.verbs.compare import CompareReport

TITLES = {
    "cosine": "cosine of the deltas",
    "output": "overlap of output directions",
    "input": "overlap of input directions",
    "opposite": "share of entries with opposite signs",
}


def compare(
    adapters: Annotated[list[str], typer.Argument(metavar="A B ...", help="Adapters: folders, files or Hub ids.")],
    plot: Annotated[
        Path | None, typer.Option("--plot", metavar="FILE", help="Write the heat maps as .png, .svg or .pdf.")
    ] = None,
    page: Annotated[
        Path | None, typer.Option("--report", metavar="FILE.html", help="Write a page with all figures.")
    ] = None,
    seed: opt.Seed = 0,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compare adapters: cosine, shared directions, sign conflict and interference, from their factors alone."""
    from lrmerge.console import emit_json, err
    from lrmerge.report import write_page
    from mergekit_lr.verbs.compare import compare as run
    from mergekit_lr.verbs.report import check_libraries

    if page is not None:
        check_libraries()
    report = run(adapters, seed=seed)
    if page is not None:
        write_page(report, page)
    if plot is not None:
        from mergekit_lr.report.heatmaps import draw_comparison

        draw_comparison(report, plot)
        err.print(f"wrote {plot}", soft_wrap=True)
    if as_json:
        emit_json(report.to_json())
    else:
        _show(report, verbose=verbose)


def _show(report: CompareReport, *, verbose: bool) -> None:
    from rich.columns import Columns

    from lrmerge.console import number, out, shortened, table, word

    out.print(Columns([_heat_map(report, key, title) for key, title in TITLES.items()], padding=(1, 4)))
    modules = sorted(report.modules, key=lambda module: -module.interference)
    shown = modules if verbose else modules[:5]
    worst = table(word("module"), number("adapters"), number("interference"))
    short = shortened([module.name for module in shown], max(out.width - 30, 20))
    for module in shown:
        worst.add_row(short[module.name], str(len(module.tasks)), f"{module.interference:.2f}")
    out.print(worst)
    if len(shown) < len(modules):
        out.print(f"the {len(shown)} of {len(modules)} modules that interfere most; all of them with -v", style="dim")
    if report.alone:
        out.print(
            f"{len(report.alone)} modules are in one adapter only, first {next(iter(report.alone))}", soft_wrap=True
        )
    norms = ", ".join(f"{name} {norm:.4g}" for name, norm in zip(report.names, report.norms, strict=True))
    out.print(f"norms: {norms}", soft_wrap=True)
    out.print(f"interference {report.interference:.2f} over {len(modules)} modules")
    for hint in report.hints:
        out.print(f"hint: {hint}", style="cyan", soft_wrap=True)


def _heat_map(report: CompareReport, key: str, title: str):
    """A matrix as coloured cells with its numbers: blue below zero, red above."""
    from rich.table import Table
    from rich.text import Text

    grid = Table(title=title, box=None, padding=0, show_header=False, title_justify="left", title_style="bold")
    for t, row in enumerate(getattr(report, key)):
        cells = [Text(f" {value:5.2f} ", style=_shade(value)) for value in row]
        grid.add_row(f"{t + 1} {report.names[t][:14]} ", *cells)
    grid.add_row("", *(Text(f"{u + 1:^7}", style="dim") for u in range(len(report.names))))
    return grid


def _shade(value: float) -> str:
    strength = round(255 * (1 - min(abs(value), 1.0)))
    colour = f"rgb(255,{strength},{strength})" if value >= 0 else f"rgb({strength},{strength},255)"
    return f"{'black' if strength > 90 else 'white'} on {colour}"
