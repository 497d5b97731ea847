"""``lrmerge report OUT``: a result as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lrmerge import options as opt


def report(
    result: Annotated[
        str, typer.Argument(metavar="OUT", help="Folder of a result, or what compare --json printed, as a file.")
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="FILE.html", help="The page [OUT/report.html].")
    ] = None,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Write one HTML page about a result: totals, energy against rank, maps of errors, how inputs meet.

    It is read from the manifest alone, needs no network, and every figure is there as a table too.
    """
    from lrmerge.console import emit_json
    from mergekit_lr.verbs.report import write_report

    page = write_report(result, out)
    if as_json:
        emit_json(page.to_json())
    elif not quiet:
        told(page.path, page.nbytes)


def told(path: str, nbytes: int) -> None:
    """Say where the page is."""
    from lrmerge.console import headline, size

    headline(path, f"{size(nbytes)}, opens in any browser")
