"""``lrmerge push OUT REPO``: a result onto the Hugging Face Hub; and what ``--push`` of other commands does."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.verbs.push import PushReport

HUB = "On the Hub"
PushTo = Annotated[
    str | None, typer.Option("--push", metavar="REPO", help="Push the result: org/name.", rich_help_panel=HUB)
]
Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="A new repository; by default as the account has it.",
        show_default=False,
        rich_help_panel=HUB,
    ),
]


def push(
    folder: Annotated[Path, typer.Argument(metavar="OUT", help="Folder of a result, a model or a PEFT adapter.")],
    repo: Annotated[str, typer.Argument(metavar="REPO", help="org/name, or a name of your own account.")],
    private: Private = None,
    revision: Annotated[
        str | None,
        typer.Option("--revision", metavar="BRANCH", help="Made where it is not there.", rich_help_panel=HUB),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Offer it as a pull request.", rich_help_panel=HUB)
    ] = False,
    commit_message: Annotated[
        str | None, typer.Option("--commit-message", metavar="TEXT", help="Of the commit.", rich_help_panel=HUB)
    ] = None,
    collection: Annotated[
        str | None,
        typer.Option("--collection", metavar="SLUG", help="Add it to this one, or TITLE.", rich_help_panel=HUB),
    ] = None,
    base_model: Annotated[
        list[str] | None,
        typer.Option("--base-model", metavar="ID", help="Hub id of a base that is a folder here; or REF=ID."),
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace what lrmerge did not write.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all, list what would change, send nothing.")
    ] = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
) -> None:
    """Push a result to the Hugging Face Hub.

    It must load, its card must name a base, and no secret and no path of this machine goes up. One commit holds all of
    it; after a broken connection the same command sends what is missing. Log in with `hf auth login`, or set HF_TOKEN.
    """
    from lrmerge.console import emit_json
    from mergekit_lr.verbs.push import push as run

    options = {
        "private": private,
        "revision": revision,
        "create_pr": create_pr,
        "commit_message": commit_message,
        "collection": collection,
        "base_model": base_model or (),
        "overwrite": overwrite,
        "dry_run": dry_run,
    }
    with _sending(quiet=quiet or as_json or dry_run) as advance:
        report = run(folder, repo, progress=advance, **options)
    if as_json:
        emit_json(report.to_json())
    elif not quiet:
        show(report)


def ready(repo: str | None, out: Path | None = None) -> None:
    """What ``--push`` asks before the work begins: a name, a token that is taken, and a folder to send."""
    if repo is None:
        return
    from mergekit_lr.errors import UsageError
    from mergekit_lr.verbs.push import check_login

    if out is not None and out.suffix == ".safetensors":
        raise UsageError(f"--push {repo}: {out} is one file, and a folder is sent; choose --to peft")
    check_login(repo)


def after(folder: Path | str, repo: str | None, *, private: bool | None, quiet: bool) -> PushReport | None:
    """Push what was just written where ``--push`` asks for it."""
    if repo is None:
        return None
    from mergekit_lr.errors import LrmergeError
    from mergekit_lr.verbs.push import push as run

    try:
        with _sending(quiet=quiet) as advance:
            return run(folder, repo, private=private, progress=advance)
    except LrmergeError as error:
        raise type(error)(
            f"{folder} is written, and not pushed (lrmerge push {folder} {repo} does it): {error}"
        ) from None


def with_push(report: dict[str, Any], sent: PushReport | None) -> dict[str, Any]:
    """The JSON of a command, and of its push."""
    return report | {"push": sent.to_json()} if sent is not None else report


def show(report: PushReport | None) -> None:
    """The files with what became of them, notes, the address and how to load it."""
    if report is None:
        return
    from lrmerge.console import err, headline, name, number, out, size, table, word

    rows = table(word("would be" if report.dry_run else "file is"), number("size"), name("name"))
    for file in report.files:
        rows.add_row(file.state, size(file.nbytes), file.name)
    out.print(rows)
    for left, why in report.left.items():
        out.print(f"not sent: {left} ({why})", style="dim", soft_wrap=True)
    for note in report.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in report.states.items())
    where = report.pull_request or report.url
    done = "nothing is sent (--dry-run)" if report.dry_run else "pushed" if report.commit else "nothing to send"
    headline(where, f"{done}; {states}; {size(report.nbytes)} to send" if report.dry_run else f"{done}; {states}")
    if report.collection:
        out.print(f"in the collection {report.collection}", soft_wrap=True)
    if not report.dry_run:
        out.print(f"\n{report.load}", soft_wrap=True)


@contextmanager
def _sending(*, quiet: bool) -> Iterator[Callable[..., None] | None]:
    """On a terminal the Hub's library draws its own bars, byte by byte; a log gets a line for each file."""
    from huggingface_hub.utils import disable_progress_bars

    from lrmerge.console import err, size

    def line(step) -> None:
        if step.name:
            err.print(f"push: {size(step.done)} of {size(step.total)}, {step.name}", soft_wrap=True)

    if quiet:
        disable_progress_bars()
    try:
        yield None if quiet or err.is_terminal else line
    except KeyboardInterrupt:
        err.print("interrupted: what was sent is kept on the Hub; the same command goes on from there")
        raise
