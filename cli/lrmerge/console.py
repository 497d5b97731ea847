"""What a person sees: progress on stderr, results on stdout, errors as one line."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import (
    BarColumn,
    DownloadColumn,
    Progress,
    SpinnerColumn,
    TextColumn,
    TimeRemainingColumn,
    TransferSpeedColumn,
)
from rich.table import Column, Table
from rich.text import Text

from mergekit_lr.errors import LrmergeError, printable
from mergekit_lr.report.quantities import duration as duration
from mergekit_lr.report.quantities import percent as percent
from mergekit_lr.report.quantities import size as size
from mergekit_lr.report.quantities import to_read as to_read

if TYPE_CHECKING:
    from mergekit_lr.graph.run import Progress as Step


class _Plain(Console):
    """Prints text as it is: it holds names from files, so nothing in it is markup, and no control character passes."""

    def __init__(self, *, stderr: bool = False):
        super().__init__(stderr=stderr, highlight=False, markup=False, emoji=False)

    def render_str(self, text: str, **options: Any) -> Text:
        return super().render_str("\n".join(map(printable, text.split("\n"))), **options)


out = _Plain()
err = _Plain(stderr=True)


def fail(error: LrmergeError) -> int:
    """Say what went wrong on one line of stderr and return the exit code."""
    # Written unwrapped, so that a long path can be copied whole.
    err.print(Text.assemble(("error: ", "bold red"), str(error)), soft_wrap=True)
    return error.exit_code


def headline(subject: str, rest: str) -> None:
    """Print one line on stdout: what it is about, and what there is to say."""
    out.print(Text.assemble((printable(subject), "bold"), printable(f": {rest}")), soft_wrap=True)


def emit_json(content: Any) -> None:
    """Print ``content`` as JSON on stdout."""
    sys.stdout.write(json.dumps(content, indent=1, allow_nan=False) + "\n")


@contextmanager
def progress(title: str, *, quiet: bool) -> Iterator[Callable[[Step], None] | None]:
    """A bar with rate and time left while a run lasts; nothing where it is quiet, plain lines off a terminal."""
    if quiet:
        from huggingface_hub.utils import disable_progress_bars

        disable_progress_bars()
    try:
        if quiet or not err.is_terminal:
            yield None if quiet else _plain(title)
        else:
            with _bar(title) as advance:
                yield advance
    except KeyboardInterrupt:
        err.print("interrupted: nothing is lost; the same command with --resume goes on from here")
        raise


@contextmanager
def _bar(title: str) -> Iterator[Callable[[Step], None]]:
    bar = Progress(
        SpinnerColumn(),
        TextColumn("{task.description}"),
        BarColumn(bar_width=None),
        DownloadColumn(),
        TransferSpeedColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[name]}", style="dim", markup=False),
        console=err,
        transient=True,
    )
    with bar:
        task = bar.add_task(title, total=None, name="")

        def advance(step: Step) -> None:
            bar.update(task, total=step.total, completed=step.done, name=_short(printable(step.name), err.width))

        yield advance


def _plain(title: str) -> Callable[[Step], None]:
    """One line for each tenth of the work, for logs."""
    said = -1

    def advance(step: Step) -> None:
        nonlocal said
        tenth = 10 * step.done // step.total if step.total else 10
        if tenth > said:
            said = tenth
            err.print(f"{title}: {10 * tenth}% of {size(step.total)}")

    return advance


def _short(name: str, width: int) -> str:
    room = max(width - 90, 0)
    return name if len(name) <= room else ("…" + name[-room + 1 :] if room > 8 else "")


def table(*columns: Column) -> Table:
    """A plain table of such columns; where the terminal is narrow, names give way and numbers stay whole."""
    return Table(*columns, box=None, pad_edge=False, header_style="bold")


def name(header: str) -> Column:
    """A column of names: left, shortened where there is no room."""
    return Column(header, overflow="ellipsis", min_width=20)


def word(header: str) -> Column:
    """A column of short words: left, never shortened."""
    return Column(header, no_wrap=True)


def number(header: str) -> Column:
    """A column of numbers: right, never shortened."""
    return Column(header, no_wrap=True, justify="right")


def shortened(names: Sequence[str], room: int) -> dict[str, str]:
    """Each name without ``.weight``, and without its beginning where it has no room: the end tells names apart."""
    bare = {name: name.removesuffix(".weight") for name in names}
    return {name: text if len(text) <= room else "…" + text[1 - room :] for name, text in bare.items()}
