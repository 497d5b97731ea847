"""``lrmerge extract BASE FINETUNED``: a LoRA out of a full fine-tune."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from lrmerge import options as opt
from lrmerge.push import Private, PushTo, after, ready, with_push
from lrmerge.push import show as show_push

if TYPE_CHECKING:
    from mergekit_lr.report.extraction import ExtractReport
    from mergekit_lr.verbs.extract.plan import ExtractPlan

WHAT = "What to extract"


def extract(
    base: Annotated[
        str, typer.Argument(metavar="BASE", help="Folder, file or Hub id (org/name@revision) of the base.")
    ],
    finetuned: Annotated[str, typer.Argument(metavar="FINETUNED", help="The same of the fine-tune.")],
    out: opt.Out = None,
    rank: Annotated[
        str | None,
        typer.Option(
            "--rank",
            metavar="N|auto",
            help="Of all, default 64; auto: above rounding noise.",
            rich_help_panel=opt.RANK,
        ),
    ] = None,
    energy: opt.Energy = None,
    error: opt.Error = None,
    size: opt.Size = None,
    max_rank: opt.MaxRank = None,
    multiple_of: opt.MultipleOf = 1,
    rank_pattern: opt.RankPattern = None,
    include: opt.Include = None,
    exclude: opt.Exclude = None,
    embeddings: Annotated[
        Literal["lora", "full", "skip"],
        typer.Option("--embeddings", help="Tables and heads that changed.", rich_help_panel=WHAT),
    ] = "lora",
    rest: Annotated[
        Literal["full", "skip"],
        typer.Option("--rest", help="Changed norms, biases and what no factors can carry.", rich_help_panel=WHAT),
    ] = "full",
    vocab: Annotated[
        Literal["refuse", "keep", "truncate"],
        typer.Option("--vocab", help="When the vocabulary grew.", rich_help_panel=WHAT),
    ] = "refuse",
    dtype: opt.Dtype = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    seed: opt.Seed = 0,
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
    """Extract a LoRA from a full fine-tune and write it as a PEFT adapter.

    Every weight's change is decomposed by a truncated SVD whose error is within 1 % of the least possible; what is kept
    and lost is reported per module.
    """
    from lrmerge.console import emit_json, progress
    from lrmerge.report import write_page
    from mergekit_lr.verbs.extract import extract as run
    from mergekit_lr.verbs.extract.plan import plan_extract
    from mergekit_lr.verbs.report import check_libraries

    chosen = {
        "rank": opt.rank_of(rank),
        "energy": energy,
        "error": error,
        "size": size,
        "max_rank": max_rank,
        "multiple_of": multiple_of,
        "rank_pattern": opt.patterns_of(rank_pattern),
        "include": include or [],
        "exclude": exclude or [],
        "embeddings": embeddings,
        "rest": rest,
        "vocab": vocab,
        "dtype": dtype,
        "memory": memory,
        "device": device,
        "threads": threads,
        "seed": seed,
    }
    if dry_run:
        plan = plan_extract(base, finetuned, **chosen)
        emit_json(plan.to_json()) if as_json else _show_plan(plan, verbose=verbose)
        return
    folder = out if out is not None else Path(f"{Path(finetuned.partition('@')[0]).name or 'extracted'}-lora")
    ready(push)
    if page:
        check_libraries()
    with progress("extract", quiet=quiet or as_json) as advance:
        report = run(base, finetuned, folder, overwrite=overwrite, resume=resume, progress=advance, **chosen)
    if page:
        write_page(folder)
    sent = after(folder, push, private=private, quiet=quiet or as_json)
    if as_json:
        emit_json(with_push(report.to_json(), sent))
    elif not quiet:
        _show(report, verbose=verbose)
        show_push(sent)


def _show(report: ExtractReport, *, verbose: bool) -> None:
    from lrmerge.console import duration, err, headline, number, out, percent, size, table, word

    shown = table(
        word("kind"), number("modules"), number("rank"), number("size"), number("energy kept"), number("error"),
        number("worst"),
    )  # fmt: skip
    itemsize = 4 if report.dtype == "float32" else 2
    for kind in dict.fromkeys(m.kind for m in report.modules):
        group = [m for m in report.modules if m.kind == kind]
        norm, kept = sum(m.squared_norm for m in group), sum(m.kept for m in group)
        worst = max(group, key=lambda m: m.error)
        ranks = {m.rank for m in group}
        shown.add_row(
            kind,
            str(len(group)),
            str(min(ranks)) if len(ranks) == 1 else f"{min(ranks)}-{max(ranks)}",
            size(sum(m.stored for m in group) * itemsize),
            percent(kept / norm),
            f"{(1 - min(kept / norm, 1)) ** 0.5:.4f}",
            f"{worst.error:.4f}",
        )
    if report.worst:
        out.print(shown)
        worst = report.worst
        out.print(f"worst module: {worst.name}, error {worst.error:.4f} at rank {worst.rank}", soft_wrap=True)
    if verbose:
        _show_modules(report)
    for state, title in (("saved", "saved in full"), ("left out", "left out")):
        group = [o for o in report.others if o.state == state]
        if group:
            out.print(f"{title}: {len(group)} ({_named(group, report.changed, verbose)})", soft_wrap=True)
    for note in report.notes:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    rate = report.read_bytes / max(report.seconds, 1e-9)
    share = report.adapter_bytes / max(report.finetuned_bytes, 1)
    headline(
        str(report.out),
        f"total rank {report.total_rank}, {size(report.adapter_bytes)} = {share:.1%} of the fine-tune, energy kept "
        f"{percent(report.energy)}, error {report.error:.4f}",
    )
    out.print(
        f"{duration(report.seconds)}, {size(rate)}/s read, peak memory {size(report.peak_bytes)}",
        style="dim",
        soft_wrap=True,
    )


def _named(group, changed: float, verbose: bool) -> str:
    """Names with the norm of their change, the largest first; all of them where it is verbose."""
    ordered = sorted(group, key=lambda other: -other.squared_norm)
    shown = ordered if verbose else ordered[:3]
    names = [f"{o.name} norm {o.squared_norm**0.5:.3g}" + (f", {o.reason}" if o.reason else "") for o in shown]
    if len(shown) < len(ordered):
        names.append(f"and {len(ordered) - len(shown)} more")
    total = sum(o.squared_norm for o in group) / changed if changed else 0.0
    return "; ".join(names) + f"; {total:.2%} of the change"


def _show_modules(report: ExtractReport) -> None:
    from lrmerge.console import number, out, percent, shortened, table, word

    headers = ("shape", "rank", "norm", "energy kept", "error", "within")
    shown = table(word("module"), *(number(header) for header in headers))
    short = shortened([m.name for m in report.modules], max(out.width - 60, 20))
    for m in report.modules:
        shape = "x".join(map(str, m.shape))
        row = (short[m.name], shape, str(m.rank), f"{m.squared_norm**0.5:.4g}", percent(m.energy), f"{m.error:.4f}")
        shown.add_row(*row, f"{m.excess:.2%}")
    out.print(shown)


def _show_plan(plan: ExtractPlan, *, verbose: bool) -> None:
    from lrmerge.console import number, out, size, table, to_read, word

    shown = table(word("treatment"), word("kind"), number("parameters"), number("read"))
    groups: dict[tuple[str, str], list[int]] = {}
    for step in plan.steps:
        read = sum(node.cost.read for node in step.nodes)
        groups.setdefault((str(step.treatment), str(step.pair.base.kind)), []).append(read)
    for (treatment, kind), reads in groups.items():
        shown.add_row(treatment, kind, str(len(reads)), size(sum(reads)))
    out.print(shown)
    if verbose:
        for step in plan.steps:
            why = f" ({step.reason})" if step.reason else ""
            out.print(f"{step.treatment} {step.pair.name} {list(step.pair.base.shape)}{why}", soft_wrap=True)
    cost, download = plan.schedule.cost, plan.base.to_download + plan.finetuned.to_download
    out.print(
        f"{len(plan.schedule.batches)} batches on {plan.resources.device} with {plan.resources.workers} workers: "
        f"{to_read(cost.read, download)}, {cost.flops / 1e12:.2f} TFLOP, peak memory {size(plan.peak)}; names from "
        f"{plan.pairing.layout.source}",
        soft_wrap=True,
    )
