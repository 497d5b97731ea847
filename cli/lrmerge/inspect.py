"""``lrmerge inspect PATH``: what is inside a checkpoint or an adapter."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.verbs.inspect import AdapterView, CheckpointView


def inspect(
    path: Annotated[str, typer.Argument(metavar="PATH", help="Folder, file or Hub id of a checkpoint or an adapter.")],
    match: Annotated[
        str | None, typer.Option("--match", "-m", metavar="REGEX", help="Only parameters whose name it is found in.")
    ] = None,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show tensors by kind with shapes, dtypes and norms; of an adapter, ranks, energy and spectra per module."""
    from lrmerge.console import emit_json
    from mergekit_lr.verbs.inspect import AdapterView
    from mergekit_lr.verbs.inspect import inspect as look

    view = look(path, match=match)
    if as_json:
        emit_json(view.to_json())
    elif isinstance(view, AdapterView):
        _show_adapter(view, verbose=verbose)
    else:
        _show_checkpoint(view, verbose=verbose)


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
            "effective": f"{m.effective_rank:.1f}",
            "99 %": str(m.rank_for(0.99)),
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
