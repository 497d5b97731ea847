"""``lrmerge inspect PATH``: what is inside a checkpoint or an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.verbs.inspect import AdapterView, CheckpointView


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, file or Hub id of a checkpoint or an adapter.")],
    match: Annotated[
        str | None, typer.Option("--match", "-m", metavar="REGEX", help="Only parameters whose name it is found in.")
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            "--base", metavar="BASE", help="The adapter's base, for --check, --intruders, and types that are no LoRA."
        ),
    ] = None,
    check: Annotated[
        bool, typer.Option("--check", help="Does every key of the adapter find its module in BASE?")
    ] = False,
    server: Annotated[
        str | None, typer.Option("--for", metavar="SERVER", help="Does vllm, sglang or tensorrt-llm load the adapter?")
    ] = None,
    intruders: Annotated[
        bool, typer.Option("--intruders", help="Leading directions that resemble none of BASE's (arXiv 2410.21228).")
    ] = False,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show tensors by kind with shapes, dtypes and norms; of an adapter, ranks, energy and spectra per module."""
    from lrmerge.console import emit_json
    from mergekit_lr.errors import UsageError
    from mergekit_lr.verbs.inspect import AdapterView
    from mergekit_lr.verbs.inspect import inspect as look

    if (check or intruders) and base is None:
        raise UsageError(f"{'--check' if check else '--intruders'} needs --base BASE")
    view = look(path, match=match, base=base)
    if not isinstance(view, AdapterView) and (check or intruders or server):
        raise UsageError(f"{path} is a checkpoint; --check, --for and --intruders are about adapters")
    if as_json:
        emit_json(view.to_json() | _questions_as_json(path, base, check, server, intruders))
    elif isinstance(view, AdapterView):
        _show_adapter(view, verbose=verbose)
    else:
        _show_checkpoint(view, verbose=verbose)
    if not as_json:
        _answer(path, base, check, server, intruders)


def _questions_as_json(path: str, base: str | None, check: bool, server: str | None, intruders: bool) -> dict[str, Any]:
    from dataclasses import asdict

    from mergekit_lr.verbs.check import check_base, check_server
    from mergekit_lr.verbs.intruders import intruders as find

    answers: dict[str, Any] = {}
    if check and base:
        answers["problems"] = check_base(path, base)
    if server:
        answers["notes_for_server"] = check_server(path, server, base)
    if intruders and base:
        answers["intruders"] = [asdict(intruder) for intruder in find(base, path)]
    return answers


def _answer(path: str, base: str | None, check: bool, server: str | None, intruders: bool) -> None:
    """Print what --check, --for and --intruders ask; an adapter that does not fit ends in exit code 1."""
    from lrmerge.console import number, out, progress, shortened, table, word
    from mergekit_lr.errors import MismatchError
    from mergekit_lr.graph.run import Progress
    from mergekit_lr.verbs.check import check_base, check_server
    from mergekit_lr.verbs.intruders import intruders as find

    if server:
        notes = check_server(path, server, base)
        out.print(f"{server} loads it" + "".join(f"; {note}" for note in notes), soft_wrap=True)
    if intruders and base:
        with progress("intruders", quiet=False) as advance:
            found = find(
                base, path, progress=advance and (lambda done, total, name: advance(Progress(done, total, name)))
            )
        shown = table(word("module"), number("index"), number("singular value"), number("similarity at most"))
        short = shortened([intruder.module for intruder in found], max(out.width - 50, 20))
        for i in found:
            shown.add_row(short[i.module], str(i.index), f"{i.singular_value:.4g}", f"{i.similarity:.3f}")
        if found:
            out.print(shown)
        out.print(f"{len(found)} intruder dimensions among the 10 leading directions of each module")
    if check and base:
        problems = check_base(path, base)
        for problem in problems:
            out.print(problem, style="red", soft_wrap=True)
        if problems:
            raise MismatchError(f"{path}: {len(problems)} of its tensors do not fit {base}")
        out.print(f"everything in it finds its place in {base}", soft_wrap=True)


def _show_checkpoint(view: CheckpointView, *, verbose: bool) -> None:
    from lrmerge.console import headline, name, number, out, size, table, word

    headline(view.ref, f"checkpoint, {view.architecture or 'unnamed architecture'}")
    shown = table(
        word("kind"), number("shape"), word("dtype"), number("count"), number("numbers"), number("size"),
        number("norm"), name("example"),
    )  # fmt: skip
    for group in view.groups:
        shape = "x".join(map(str, group.shape))
        numbers = f"{group.parameters:,}"
        norm = f"{group.rms_norm:.4g}"
        shown.add_row(
            group.kind, shape, group.dtype, str(group.count), numbers, size(group.nbytes), norm, group.example
        )
    out.print(shown)
    if verbose:
        names = table(name("parameter"), word("kind"), number("shape"), number("norm"))
        for entry in view.entries:
            names.add_row(entry.name, entry.kind, "x".join(map(str, entry.shape)), f"{entry.norm:.4g}")
        out.print(names)
    out.print(
        f"{len(view.entries)} parameters, {sum(e.parameters for e in view.entries):,} numbers, {size(view.nbytes)}"
    )


def _show_adapter(view: AdapterView, *, verbose: bool) -> None:
    from lrmerge.console import headline, number, out, shortened, table, word

    headline(view.ref, f"adapter ({view.dialect}) of {view.base or 'an unnamed base'}")
    wide = out.width >= 110
    headers = (
        ("kind", "shape", "rank", "scaling", "norm", "effective", "99 %") if wide else ("shape", "rank", "norm", "99 %")
    )
    modules = table(word("module"), *(number(header) for header in headers), word("spectrum"))
    short = shortened([m.name for m in view.modules], max(out.width - (78 if wide else 48), 20))
    shown = view.modules if verbose or len(view.modules) <= 40 else view.largest(40)
    for m in shown:
        cells = {
            "kind": m.kind,
            "shape": "x".join(map(str, m.shape)),
            "rank": str(m.rank),
            "scaling": f"{m.scaling:.3g}",
            "norm": f"{m.norm:.4g}",
            "effective": f"{m.effective_rank:.1f}" if m.singular_values else "-",
            "99 %": str(m.rank_for(0.99)) if m.singular_values else "-",
        }
        modules.add_row(short[m.name], *(cells[header] for header in headers), spark(m.singular_values))
    out.print(modules)
    if len(shown) < len(view.modules):
        out.print(f"the {len(shown)} largest of {len(view.modules)} modules; all of them with -v", style="dim")
    for saved, shape in view.saved.items():
        if verbose or len(view.saved) <= 8:
            out.print(f"saved in full: {saved} {list(shape)}", soft_wrap=True)
    if not verbose and len(view.saved) > 8:
        out.print(f"saved in full: {len(view.saved)} tensors, first {next(iter(view.saved))}")
    for note in view.notes:
        out.print(f"note: {note}", style="yellow", soft_wrap=True)
    out.print(f"{len(view.modules)} modules, total rank {view.total_rank}, norm {view.norm:.4g}")


def spark(values: tuple[float, ...], width: int = 16) -> str:
    """A spectrum as a line of blocks, singular values against the largest, one column per value or per group."""
    blocks = " ▁▂▃▄▅▆▇█"
    if not values or values[0] <= 0:
        return ""
    count = min(width, len(values))
    starts = [round(i * len(values) / count) for i in range(count)]
    return "".join(
        blocks[max(1, round(8 * values[start] / values[0]))] if values[start] > 0 else " " for start in starts
    )
