"""The command ``lrmerge``: one typer app, one file per command, errors as one line."""

from __future__ import annotations

import os
import sys

import typer

from lrmerge.apply import apply
from lrmerge.compare import compare
from lrmerge.compress import compress
from lrmerge.convert import convert
from lrmerge.doctor import doctor
from lrmerge.extract import extract
from lrmerge.inspect import inspect
from lrmerge.merge import merge
from lrmerge.methods import methods
from lrmerge.plan import plan
from lrmerge.push import push
from lrmerge.report import report

app = typer.Typer(
    name="lrmerge",
    help="Merge models and adapters through the low rank of what fine-tuning changed.",
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract)
app.command()(compress)
app.command()(convert)
app.command()(apply)
app.command()(merge)
app.command()(plan)
app.command()(push)
app.command()(methods)
app.command()(inspect)
app.command()(compare)
app.command()(report)
app.command()(doctor)


# What typer raises for an option or an argument that does not parse. It brings its own copy of click.
Unparsed: type[Exception] = typer.BadParameter.__mro__[1]


@app.callback(invoke_without_command=True)
def start(context: typer.Context, show: bool = typer.Option(False, "--version", help="Show the version.")) -> None:
    """Merge models and adapters through the low rank of what fine-tuning changed."""
    if show:
        from importlib.metadata import version

        print(f"lrmerge {version('lrmerge')}")
    elif context.invoked_subcommand is None:
        print(context.get_help())


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 1 (data) or 2 (usage)."""
    from mergekit_lr.errors import LrmergeError, UsageError

    if not sys.stderr.isatty():  # a log wants no moving bars
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    try:
        sys.exit(app(standalone_mode=False))
    except LrmergeError as error:
        from lrmerge.console import fail

        sys.exit(fail(error))
    except Unparsed as error:
        from lrmerge.console import fail

        sys.exit(fail(UsageError(" ".join(error.format_message().split()).rstrip("."))))  # type: ignore[attr-defined]
