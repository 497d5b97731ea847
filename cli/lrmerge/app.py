"""The command ``lrmerge``: one typer app, one file per command, errors as one line."""

from __future__ import annotations

import sys

import typer

from lrmerge.doctor import doctor
from lrmerge.extract import extract
from lrmerge.inspect import inspect

app = typer.Typer(
    name="lrmerge",
    help="Merge models and adapters through the low rank of what fine-tuning changed.",
    no_args_is_help=True,
    add_completion=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
app.command()(extract)
app.command()(inspect)
app.command()(doctor)


@app.callback(invoke_without_command=True)
def version(show: bool = typer.Option(False, "--version", help="Show the version and exit.")) -> None:
    """Merge models and adapters through the low rank of what fine-tuning changed."""
    if show:
        from importlib.metadata import version

        print(f"lrmerge {version('lrmerge')}")
        raise typer.Exit


def main() -> None:
    """Run the command line; a user's mistake ends in one line and exit code 1 (data) or 2 (usage)."""
    try:
        app()
    except KeyboardInterrupt:
        sys.exit(130)
    except Exception as error:
        from mergekit_lr.errors import LrmergeError

        if not isinstance(error, LrmergeError):
            raise
        from lrmerge.console import fail

        sys.exit(fail(error))
