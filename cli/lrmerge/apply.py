"""``lrmerge apply BASE ADAPTER[:WEIGHT]...``: adapters baked into a model."""

from __future__ import annotations

from collections.abc import Sized
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.report.application import ApplyReport
    from mergekit_lr.verbs.apply.plan import ApplyPlan


def apply(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder, file or Hub id (org/name@revision) of the model.")
    ],
    adapters: Annotated[
        list[str],
        typer.Argument(metavar="ADAPTER[:WEIGHT]...", help="Folders, files or Hub ids; a weight is 1 unless given."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", metavar="OUT", help="Folder of the result.")],
    unmerge: Annotated[bool, typer.Option("--unmerge", help="Take the adapters out of BASE instead.")] = False,
    rounding: Annotated[
        Literal["nearest", "stochastic"],
        typer.Option("--rounding", help="stochastic: unbiased, for changes that the dtype would swallow."),
    ] = "nearest",
    dtype: Annotated[
        str | None,
        typer.Option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 [each tensor's own]."),
    ] = None,
    shard_size: Annotated[
        str | None,
        typer.Option("--shard-size", "--out-shard-size", metavar="SIZE", help="Cut files anew: 5GB [as BASE's]."),
    ] = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    seed: Annotated[int, typer.Option("--seed", "--random-seed", metavar="N", help="Seed of stochastic rounding.")] = 0,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Bake one or several adapters into a model, each with its weight, and write the whole model.

    Every weight is summed in float32 and rounded once; what rounding loses of each change is reported. Tensors that no
    adapter touches are copied byte for byte. Memory does not grow with the model.
    """
    from lrmerge.console import emit_json, progress
    from mergekit_lr.verbs.apply import apply as run
    from mergekit_lr.verbs.apply.plan import plan_apply

    chosen = {
        "unmerge": unmerge,
        "rounding": rounding,
        "dtype": dtype,
        "shard_size": shard_size,
        "memory": memory,
        "device": device,
        "threads": threads,
        "seed": seed,
    }
    given = [_weighted(text) for text in adapters]
    if dry_run:
        plan = plan_apply(base, given, **chosen)
        emit_json(plan.to_json()) if as_json else _show_plan(plan, verbose=verbose)
        return
    with progress("apply", quiet=quiet or as_json) as advance:
        report = run(base, given, out, overwrite=overwrite, resume=resume, progress=advance, **chosen)
    if as_json:
        emit_json(report.to_json())
    elif not quiet:
        _show(report, verbose=verbose)


def _weighted(text: str) -> tuple[str, float]:
    """``my-lora:0.7`` as (my-lora, 0.7); a path that holds a colon is taken as it is where it exists."""
    from mergekit_lr.errors import UsageError

    ref, colon, weight = text.rpartition(":")
    if not colon or Path(text).exists():
        return text, 1.0
    try:
        return ref, float(weight)
    except ValueError:
        raise UsageError(f"{text}: the weight {weight!r} is not a number; write ADAPTER:WEIGHT, my-lora:0.7") from None


def _show(report: ApplyReport, *, verbose: bool) -> None:
    from lrmerge.console import duration, err, headline, name, number, out, shortened, size, table, word

    worst = sorted(report.changed, key=lambda figures: -figures.rounding_error)
    shown = report.changed if verbose else worst[:8]
    rows = table(
        name("parameter"), word("kind"), number("shape"), word("by"), number("change"), number("rounding error")
    )
    names = shortened([figures.name for figures in shown], 60)
    for figures in shown:
        shape, error = "x".join(map(str, figures.shape)), _share(figures.rounding_error)
        rows.add_row(names[figures.name], figures.kind, shape, figures.by, f"{figures.norm:.4g}", error)
    out.print(rows)
    if len(shown) < len(report.changed):
        out.print(f"the worst rounded of {len(report.changed)} changed parameters; all of them with -v", style="dim")
    for note in report.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in report.states.items())
    headline(
        str(report.out),
        f"{size(report.written_bytes)} in {_files(report.files)}, tensors: {states}; change of norm {report.norm:.4g}, "
        f"rounding error {_share(report.rounding_error)} of it",
    )
    rate = report.read_bytes / max(report.seconds, 1e-9)
    out.print(
        f"{duration(report.seconds)}, {size(rate)}/s read, peak memory {size(report.peak_bytes)}",
        style="dim",
        soft_wrap=True,
    )


def _show_plan(plan: ApplyPlan, *, verbose: bool) -> None:
    from collections import Counter

    from lrmerge.console import err, out, size, to_read

    for (how, kind), count in Counter((t.how, str(t.parameter.kind)) for t in plan.targets).items():
        out.print(f"change: {count} {kind} parameters by {how}")
    if verbose:
        for name, state in plan.states.items():
            out.print(f"{state} {name} {list(plan.outputs[name][1])}", soft_wrap=True)
    for note in plan.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in Counter(plan.states.values()).items())
    out.print(
        f"tensors: {states}; {to_read(plan.schedule.cost.read, plan.base.to_download)}, {size(plan.written)} to write "
        f"in {_files(plan.files)}, {len(plan.schedule.batches)} batches on {plan.resources.device} with "
        f"{plan.resources.workers} workers, peak memory {size(plan.peak)}; names from {plan.layout.source}",
        soft_wrap=True,
    )


def _share(ratio: float) -> str:
    return f"{ratio:.2%}".replace("%", " %")


def _files(files: Sized) -> str:
    return f"{len(files)} files" if len(files) > 1 else "one file"
