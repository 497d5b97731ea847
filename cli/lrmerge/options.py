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
    typer.Option("--memory", "--ram", metavar="SIZE", help="Budget of the whole process [half of what is free]."),
]
Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
Threads = Annotated[
    int | None, typer.Option("--threads", "-j", metavar="N", help="Modules computed side by side [all cores].")
]
Seed = Annotated[int, typer.Option("--seed", "--random-seed", metavar="N", help="Seed of the random sketches.")]
Dtype = Annotated[
    str | None,
    typer.Option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 [that of the fine-tune]."),
]
Out = Annotated[Path | None, typer.Option("--out", "-o", metavar="OUT", help="Folder of the result.")]
