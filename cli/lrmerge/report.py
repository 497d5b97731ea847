"""``lrmerge report OUT``: a result as one HTML page."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

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
    from lrmerge.console import emit_json, headline, size
    from mergekit_lr.verbs.report import write_report

    page = write_report(result, out)
    if as_json:
        emit_json(page.to_json())
    elif not quiet:
        headline(page.path, f"{size(page.nbytes)}, opens in any browser")


def write_page(result: Any, out: Path | None = None) -> None:
    """The page that another command's ``--report`` asks for; where it is goes to stderr."""
    from lrmerge.console import err
    from mergekit_lr.verbs.report import write_report

    err.print(f"wrote {write_report(result, out).path}", soft_wrap=True)
