"""``lrmerge convert ADAPTER --to DIALECT``: another dialect, another type, another layout of experts."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.verbs.convert.plan import ConvertPlan

WHAT = "What to write"


def convert(
    adapter: Annotated[
        str, typer.Argument(metavar="ADAPTER", help="A PEFT folder of any type, a file of any dialect, a Hub id.")
    ],
    to: Annotated[
        Literal["peft", "kohya", "lycoris", "diffusers", "comfy"],
        typer.Option("--to", help="Dialect of the result.", rich_help_panel=WHAT),
    ],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The result: a folder, or a .safetensors file.")
    ] = None,
    experts: Annotated[
        Literal["fused", "per-expert"] | None,
        typer.Option("--experts", help="On stacks of experts, or on single ones.", rich_help_panel=WHAT),
    ] = None,
    dora: Annotated[
        Literal["keep", "fold"],
        typer.Option("--dora", help="fold: into factors; needs --base.", rich_help_panel=WHAT),
    ] = "keep",
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="The base: names, kinds, weights.", rich_help_panel=WHAT),
    ] = None,
    component: opt.Component = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    error: opt.Error = None,
    max_rank: opt.MaxRank = None,
    multiple_of: opt.MultipleOf = 1,
    dtype: opt.Dtype = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
    overwrite: opt.Overwrite = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Convert an adapter: between dialects, PEFT's types, and layouts of experts.

    Lossless where the formats allow it: factors and scales stay as they are. What is not of low rank is decomposed, and
    the loss is reported.
    """
    from lrmerge.compress import default_out, show
    from lrmerge.console import emit_json, progress
    from mergekit_lr.verbs.convert import convert as run
    from mergekit_lr.verbs.convert.plan import plan_convert

    chosen = {
        "to": to,
        "experts": experts,
        "dora": dora,
        "base": base,
        "component": component,
        "rank": opt.rank_of(rank),
        "energy": energy,
        "error": error,
        "max_rank": max_rank,
        "multiple_of": multiple_of,
        "dtype": dtype,
        "memory": memory,
        "device": device,
        "threads": threads,
        "seed": seed,
    }
    if dry_run:
        plan = plan_convert(adapter, **chosen)  # type: ignore[arg-type]
        emit_json(plan.to_json()) if as_json else _show_plan(plan, verbose=verbose)
        return
    path: Path = out if out is not None else default_out(adapter, f"-{to}", to)
    with progress("convert", quiet=quiet or as_json) as advance:
        report = run(adapter, path, overwrite=overwrite, progress=advance, **chosen)
    if as_json:
        emit_json(report.to_json())
    elif not quiet:
        show(report, verbose=verbose)


def _show_plan(plan: ConvertPlan, *, verbose: bool) -> None:
    from lrmerge.console import out, size

    others = plan.others(plan.left_out)
    written = [step for step in plan.steps if step.name not in plan.left_out]
    for action in dict.fromkeys(step.action for step in written):
        group = [step for step in written if step.action == action]
        reasons = sorted({step.reason for step in group if step.reason})
        why = f" ({', '.join(reasons)})" if reasons else ""
        out.print(f"{action}: {len(group)} modules, {size(sum(s.nbytes for s in group))}{why}", soft_wrap=True)
    if verbose:
        for step in written:
            of_rank = f" rank {step.rank}" if step.rank else ""
            out.print(f"{step.action} {step.name}{of_rank} {size(step.nbytes)} {step.reason}".rstrip(), soft_wrap=True)
        for other in others:
            out.print(f"{other.state} {other.part} {other.name} {size(other.nbytes)}", soft_wrap=True)
    elif others:
        states = Counter(f"{other.part} {other.state}" for other in others)
        out.print(f"beside the factors: {', '.join(f'{n} {state}' for state, n in states.items())}", soft_wrap=True)
    lossy = sum(not step.exact for step in written)
    lost = f"{lossy} modules may lose what their rank does not hold" if lossy else "nothing is lost"
    if plan.left_out:
        lost += f"; {len(plan.left_out)} modules of other components are left out"
    out.print(f"{lost}{'; rounded to ' + str(plan.dtype).removeprefix('torch.') if plan.dtype else ''}", soft_wrap=True)
    out.print(
        f"{plan.source.dialect} -> {plan.to}: {size(plan.source.nbytes)} to read, {'at most ' if lossy else ''}"
        f"{size(plan.written)} of tensors to write, on {plan.resources.device} with {plan.resources.workers} workers, "
        f"peak memory {size(plan.peak)}",
        soft_wrap=True,
    )
