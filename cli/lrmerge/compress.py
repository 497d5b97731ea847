"""``lrmerge compress ADAPTER``: a LoRA at lower ranks, or in the form that a server loads."""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lrmerge import options as opt
from lrmerge.push import Private, PushTo, after, ready, with_push
from lrmerge.push import show as show_push

if TYPE_CHECKING:
    from mergekit_lr.report.compression import AdapterReport, ModuleChange
    from mergekit_lr.verbs.compress.plan import CompressPlan

WHAT = "What to compress, and what for"


def compress(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="A PEFT folder, a file of any dialect, a Hub id.")],
    out: Annotated[
        Path | None, typer.Option("--out", "-o", metavar="OUT", help="The result: a folder, or a .safetensors file.")
    ] = None,
    rank: opt.Rank = None,
    energy: opt.Energy = None,
    error: opt.Error = None,
    size: opt.Size = None,
    max_params: Annotated[
        int | None,
        typer.Option("--max-params", metavar="N", help="One budget for all, in numbers.", rich_help_panel=opt.RANK),
    ] = None,
    max_rank: opt.MaxRank = None,
    multiple_of: opt.MultipleOf = 1,
    rank_pattern: opt.RankPattern = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    target: Annotated[
        Literal["vllm", "sglang", "tensorrt-llm", "peft"] | None,
        typer.Option("--target", help="Make it fit a server; alone: without compressing.", rich_help_panel=WHAT),
    ] = None,
    to: Annotated[
        Literal["peft", "kohya", "lycoris", "diffusers", "comfy"] | None,
        typer.Option("--to", help="Dialect of the result; by default ADAPTER's.", rich_help_panel=WHAT),
    ] = None,
    component: opt.Component = None,
    base: Annotated[
        str | None,
        typer.Option("--base", metavar="BASE", help="The base, where names need it.", rich_help_panel=WHAT),
    ] = None,
    dtype: opt.Dtype = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    push: PushTo = None,
    private: Private = None,
    overwrite: opt.Overwrite = False,
    page: opt.Page = False,
    dry_run: opt.DryRun = False,
    as_json: opt.Json = False,
    quiet: opt.Quiet = False,
    verbose: opt.Verbose = False,
) -> None:
    """Compress a LoRA to lower ranks after training.

    Every module becomes its best approximation, and its error is known exactly. Modules that need all of their rank
    stay as they are, byte for byte.
    """
    from lrmerge.console import emit_json, progress
    from lrmerge.report import write_page
    from mergekit_lr.verbs.compress import compress as run
    from mergekit_lr.verbs.compress.plan import plan_compress
    from mergekit_lr.verbs.report import check_libraries

    chosen = {
        "rank": opt.rank_of(rank),
        "energy": energy,
        "error": error,
        "size": size,
        "max_params": max_params,
        "max_rank": max_rank,
        "multiple_of": multiple_of,
        "rank_pattern": opt.patterns_of(rank_pattern),
        "include": include or [],
        "exclude": exclude or [],
        "to": to,
        "target": target,
        "component": component,
        "base": base,
        "dtype": dtype,
        "memory": memory,
        "device": device,
        "threads": threads,
    }
    if dry_run:
        plan = plan_compress(adapter, **chosen)
        emit_json(plan.to_json()) if as_json else _show_plan(plan, verbose=verbose)
        return
    path = out if out is not None else default_out(adapter, "-compressed", to if target is None else "peft")
    ready(push, path)
    if page:
        check_libraries()
    with progress("compress", quiet=quiet or as_json) as advance:
        report = run(adapter, path, overwrite=overwrite, progress=advance, **chosen)
    if page:
        write_page(path)
    sent = after(path, push, private=private, quiet=quiet or as_json)
    if as_json:
        emit_json(with_push(report.to_json(), sent))
    elif not quiet:
        show(report, verbose=verbose)
        show_push(sent)


def default_out(adapter: str, ending: str, to: str | None) -> Path:
    """A name beside nothing else: that of the source with ``ending``, a file's where a file is written."""
    name = Path(adapter.partition("@")[0])
    file = name.suffix == ".safetensors" if to is None else to != "peft"
    return Path(f"{name.stem if name.suffix == '.safetensors' else name.name}{ending}{'.safetensors' if file else ''}")


def show(report: AdapterReport, *, verbose: bool) -> None:
    """The table of a compression or a conversion, its notes and its totals."""
    from lrmerge.console import duration, err, headline, number, out, percent, size, table, word

    shown = table(
        word("done"), word("kind"), number("modules"), number("rank"), number("energy kept"),
        number("error"), number("worst"),
    )  # fmt: skip
    for state, kind in dict.fromkeys((m.state, m.kind) for m in report.modules):
        group = [m for m in report.modules if (m.state, m.kind) == (state, kind)]
        norm, lost = sum(m.squared_norm for m in group), sum(m.squared_error for m in group)
        share = lost / norm if norm else 0.0
        shown.add_row(
            state,
            kind,
            str(len(group)),
            _arrow(_range([m.rank_before for m in group]), _range([m.rank for m in group])),
            percent(1 - share),
            f"{share**0.5:.4f}",
            f"{max(m.error for m in group):.4f}",
        )
    if report.modules:
        out.print(shown)
    if (worst := report.worst) and worst.error:
        out.print(f"worst module: {worst.name}, error {worst.error:.4f} at rank {worst.rank}", soft_wrap=True)
    if verbose:
        for module in report.modules:
            out.print(_line(module), soft_wrap=True)
        for other in report.others:
            out.print(f"{other.state} {other.part} {other.name} {size(other.nbytes)}", soft_wrap=True)
    elif report.others:
        states = Counter(f"{other.part} {other.state}" for other in report.others)
        named = ", ".join(f"{count} {state}" for state, count in states.items())
        out.print(f"beside the factors: {named}", soft_wrap=True)
    for note in report.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    computed = any(m.state in ("compressed", "decomposed", "folded") for m in report.modules)
    rounding = f" (and {report.rounding:.1g} from rounding to {report.dtype})" if computed else ""
    headline(
        str(report.out),
        f"{report.to}, total rank {report.rank_before} -> {report.total_rank}, {size(report.bytes_before)} -> "
        f"{size(report.bytes_after)}, energy kept {percent(report.energy)}, error {report.error:.4f}{rounding}",
    )
    out.print(f"{duration(report.seconds)}, peak memory {size(report.peak_bytes)}", style="dim", soft_wrap=True)


def _line(m: ModuleChange) -> str:
    shape = "x".join(map(str, m.shape))
    why = f" ({m.reason})" if m.reason else ""
    return f"{m.state} {m.name} {shape}: rank {m.rank_before} -> {m.rank}, error {m.error:.4g}{why}"


def _arrow(before: str, after: str) -> str:
    return before if before == after else f"{before} -> {after}"


def _range(ranks: list[int]) -> str:
    return str(ranks[0]) if len(set(ranks)) == 1 else f"{min(ranks)}-{max(ranks)}"


def _show_plan(plan: CompressPlan, *, verbose: bool) -> None:
    from lrmerge.console import out, size

    groups: dict[tuple[bool, str, int], int] = {}
    for step in plan.steps:
        key = (step.rule is not None, str(step.weight.kind), step.weight.delta.rank)
        groups[key] = groups.get(key, 0) + 1
    for (compressed, kind, rank), count in groups.items():
        out.print(f"{'compress' if compressed else 'keep'}: {count} {kind} modules of rank {rank}")
    if verbose:
        for step in plan.steps:
            action = "keep" if step.rule is None else "compress"
            shape, rank = list(step.weight.delta.shape), step.weight.delta.rank
            out.print(f"{action} {step.name} {shape} rank {rank} {step.reason}".rstrip(), soft_wrap=True)
    cost = plan.schedule.cost
    out.print(
        f"{len(plan.schedule.batches)} batches on {plan.resources.device} with {plan.resources.workers} workers: "
        f"{size(cost.read)} to read, {cost.flops / 1e9:.2f} GFLOP, peak memory "
        f"{size(plan.peak)}; written as {plan.to}",
        soft_wrap=True,
    )
