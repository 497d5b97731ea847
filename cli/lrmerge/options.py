"""Options that several commands share, under one name and one help text."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier result at OUT.")]
Page = Annotated[bool, typer.Option("--report", help="Also write a page about the result, OUT/report.html.")]
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

Component = Annotated[
    str | None, typer.Option("--component", metavar="NAME", help="Part of a picture model: unet, text_encoder ...")
]

RANK = "How to choose the rank"
Rank = Annotated[
    str | None,
    typer.Option("--rank", metavar="N", help="Of every module.", rich_help_panel=RANK),
]
Energy = Annotated[
    float | None,
    typer.Option("--energy", metavar="F", help="Keep this share of each squared norm.", rich_help_panel=RANK),
]
Error = Annotated[
    float | None,
    typer.Option(
        "--error",
        "--rel-error",
        metavar="F",
        help="Keep each relative error at or below; 0: lossless.",
        rich_help_panel=RANK,
    ),
]
Size = Annotated[
    str | None,
    typer.Option("--size", "--bytes", metavar="SIZE", help="One budget for the file: 200MB.", rich_help_panel=RANK),
]
MaxRank = Annotated[
    int | None, typer.Option("--max-rank", metavar="N", help="Never more than this.", rich_help_panel=RANK)
]
MultipleOf = Annotated[
    int, typer.Option("--multiple-of", metavar="N", help="Round ranks up to a multiple.", rich_help_panel=RANK)
]
RankPattern = Annotated[
    list[str] | None,
    typer.Option("--rank-pattern", metavar="REGEX=N", help="A rank of their own; repeatable.", rich_help_panel=RANK),
]
WHICH = "Which modules"
Include = Annotated[
    list[str] | None,
    typer.Option("--include", "-i", metavar="REGEX", help="Only these; repeatable.", rich_help_panel=WHICH),
]
Exclude = Annotated[
    list[str] | None,
    typer.Option("--exclude", "-e", metavar="REGEX", help="Not these; repeatable.", rich_help_panel=WHICH),
]


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
