"""``lrmerge merge RECIPE [OUT]``: models or adapters merged by a recipe."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lrmerge import options as opt
from lrmerge.push import Private, PushTo, after, ready, with_push
from lrmerge.push import show as show_push

if TYPE_CHECKING:
    from mergekit_lr.report.merging import MergeReport

Dtype = Annotated[
    str | None, typer.Option("--dtype", metavar="DTYPE", help="float32, float16 or bfloat16 [the recipe's].")
]
ShardSize = Annotated[
    str | None,
    typer.Option("--shard-size", "--out-shard-size", metavar="SIZE", help="Cut files anew: 5GB [as the base's]."),
]
Seed = Annotated[int, typer.Option("--seed", "--random-seed", metavar="N", help="Seed of methods that draw.")]


def merge(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file: mergekit's, or with our keys.")],
    place: Annotated[Path | None, typer.Argument(metavar="[OUT]", help="Folder of the result.")] = None,
    out: opt.Out = None,
    dtype: Dtype = None,
    shard_size: ShardSize = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    seed: Seed = 0,
    push: PushTo = None,
    private: Private = None,
    overwrite: opt.Overwrite = False,
    resume: opt.Resume = False,
    page: opt.Page = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Merge models or adapters as a recipe says, and write the model or the adapter.

    mergekit's recipes run unchanged. Every tensor is merged in float32 and rounded once; memory does not grow with the
    model. ``lrmerge methods`` lists the methods, ``lrmerge plan`` shows what a recipe would do.
    """
    from lrmerge.console import emit_json, progress
    from lrmerge.plan import show_documents
    from lrmerge.report import write_page
    from mergekit_lr.errors import UsageError
    from mergekit_lr.verbs.merge import merge as run
    from mergekit_lr.verbs.merge.verb import plan_documents
    from mergekit_lr.verbs.report import check_libraries

    chosen = {
        "dtype": dtype,
        "shard_size": shard_size,
        "memory": memory,
        "device": device,
        "threads": threads,
        "seed": seed,
    }
    if dry_run:
        show_documents(plan_documents(recipe, **chosen), as_json=as_json, verbose=verbose)
        return
    if (place is None) == (out is None):
        raise UsageError("where to? name one folder: lrmerge merge RECIPE OUT" if out is None else "OUT is named twice")
    folder = place or out
    ready(push, folder)
    if page:
        check_libraries()
    with progress("merge", quiet=quiet or as_json) as advance:
        report = run(
            recipe, folder, overwrite=overwrite, resume=resume, progress=advance, compare_inputs=page, **chosen
        )
    if page:
        write_page(folder)
    sent = after(str(folder), push, private=private, quiet=quiet or as_json)
    if as_json:
        emit_json(with_push(report.to_json(), sent))
    elif not quiet:
        _show(report, verbose=verbose)
        show_push(sent)


def _show(report: MergeReport, *, verbose: bool) -> None:
    from lrmerge.console import duration, err, headline, name, number, out, shortened, size, table, word

    most = sorted(report.tensors, key=lambda tensor: -tensor.squared_norm)
    shown = report.tensors if verbose else most[:8]
    truncated = any(tensor.rank is not None and tensor.rounding for tensor in report.tensors)
    lost = [number("lost")] if truncated else []
    rows = table(name("tensor"), number("shape"), number("rank"), number("change"), *lost, word("state"))
    names = shortened([tensor.name for tensor in shown], 60)
    for tensor in shown:
        shape, rank = "x".join(map(str, tensor.shape)), "" if tensor.rank is None else str(tensor.rank)
        lost = [f"{tensor.error:.2%}".replace("%", " %")] if truncated else []
        rows.add_row(names[tensor.name], shape, rank, f"{tensor.norm:.4g}", *lost, tensor.state)
    out.print(rows)
    if len(shown) < len(report.tensors):
        out.print(f"the most changed of {len(report.tensors)} tensors; all of them with -v", style="dim")
    for note in report.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in report.states.items())
    files = f"{len(report.files)} files" if len(report.files) > 1 else "one file"
    lost = f"{report.rounding_error:.2%}".replace("%", " %")
    headline(
        str(report.out),
        f"{size(report.written_bytes)} in {files}, tensors: {states}; change of norm {report.norm:.4g}, lost {lost} "
        f"of it by {'rounding' if report.kind == 'model' else 'truncation'}",
    )
    rate = report.read_bytes / max(report.seconds, 1e-9)
    out.print(
        f"{duration(report.seconds)}, {size(rate)}/s read, peak memory {size(report.peak_bytes)}",
        style="dim",
        soft_wrap=True,
    )
