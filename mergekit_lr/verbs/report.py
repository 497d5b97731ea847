"""Show a result as one HTML page: what was kept and lost, where, and how inputs of a merge meet."""

from __future__ import annotations

import os
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lr.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lr.verbs.compare import CompareReport

PAGE = "report.html"
LIBRARIES = ("vl_convert", "jinja2")


@dataclass(frozen=True)
class PageReport:
    """The page that was written.

    path: of it. verb: whose result it shows. nbytes: its size. figures: id of each to the number of its marks.
    """

    path: str
    verb: str
    nbytes: int
    figures: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def write_report(result: str | Path | CompareReport, out: str | Path | None = None) -> PageReport:
    """Write a page about a result, from its manifest alone; no weight is read.

    Args:
        result: folder of any verb's result, its ``lrmerge.json``, a file of an adapter beside its manifest, what
            ``compare --json`` printed, or a ``CompareReport``.
        out: the page; by default ``report.html`` in the result's folder, or beside its file.

    Raises:
        UsageError: no manifest, the drawing libraries are missing, or ``out`` cannot be written.
        FormatError: the manifest is damaged.
    """
    check_libraries()
    from mergekit_lr.report.page.content import content_of
    from mergekit_lr.report.page.html import page
    from mergekit_lr.report.page.manifests import Comparison, read
    from mergekit_lr.report.page.sections import sections_of

    if isinstance(result, (str, Path)):
        source = Path(result).expanduser()
        content = content_of(read(source), name=source.name)
        target = _target(source, out)
    else:
        content = content_of(Comparison.model_validate(result.to_json()))
        if out is None:
            raise UsageError("a report of a comparison needs a name: FILE.html")
        target = Path(out).expanduser()
    if target.suffix != ".html":
        raise UsageError(f"{target}: a report is a page; its name ends in .html")
    sections = sections_of(content)
    text = page(content, sections)
    partial = target.with_name(f".{target.name}.partial")
    try:
        partial.write_text(text, encoding="utf-8")
        os.replace(partial, target)
    except OSError as error:
        raise UsageError(f"{target}: cannot be written ({error.strerror}); choose another --out") from None
    figures = {figure.id: figure.marks for section in sections for figure in section.figures}
    return PageReport(str(target), content.verb, target.stat().st_size, figures)


def check_libraries() -> None:
    """Whether a page can be made: to be asked before a long run, not after it.

    Raises:
        UsageError: a library for drawing is not installed.
    """
    missing = [name for name in LIBRARIES if find_spec(name) is None]
    if missing:
        raise UsageError(f"reports need {' and '.join(missing)}: pip install 'lrmerge[plot]'")


def _target(source: Path, out: str | Path | None) -> Path:
    if out is not None:
        return Path(out).expanduser()
    if source.is_dir():
        return source / PAGE
    return source.with_name(PAGE if source.name == "lrmerge.json" else f"{source.name.partition('.')[0]}.html")
