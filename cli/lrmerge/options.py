"""Options that several commands share, under one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at OUT.")]
Resume = Annotated[bool, typer.Option("--resume", help="Continue a run that was cut off.")]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Print the plan from headers alone, and stop.")]
Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON on stdout.")]
Quiet = Annotated[bool, typer.Option("--quiet", "-q", help="No progress and no table.")]
Verbose = Annotated[bool, typer.Option("--verbose", "-v", help="A line for every tensor.")]
Memory = Annotated[
    str | None,
    typer.Option("--memory", "--ram", metavar="SIZE", help="Of the whole process; by default half of what is free."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None,
    typer.Option("--threads", "-j", metavar="N", help="Computed side by side; by default one per core."),
]
Seed = Annotated[int, typer.Option("--seed", "--random-seed", metavar="N", help="Seed of the random sketches.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16; by default that of the input."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="Folder of the result.")]


def rank_of(text: str | None) -> int | str | None:
    """The value of --rank: a number, or ``auto``."""
    from mergekit_lr.errors import UsageError

    if text is None or text == "auto":
        return text
    if not text.isdigit():
        raise UsageError(f"--rank {text}: a number from 1, or auto")
    return int(text)


def patterns_of(items: list[str] | None) -> dict[str, int]:
    """The values of --rank-pattern: regular expression to rank."""
    from mergekit_lr.errors import UsageError

    patterns = {}
    for item in items or ():
        pattern, equals, count = item.rpartition("=")
        if not equals or not pattern or not count.isdigit():
            raise UsageError(f"--rank-pattern {item}: write REGEX=N, as in 'mlp\\.down_proj=32'")
        patterns[pattern] = int(count)
    return patterns
