"""``lrmerge plan RECIPE``: what a merge would do to every tensor, from headers alone, and about how long it takes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Any

import typer

from lrmerge import merge as merging
from lrmerge import options as opt


def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A YAML file: mergekit's, or with our keys.")],
    dtype: merging.Dtype = None,
    shard_size: merging.ShardSize = None,
    memory: opt.Memory = None,
    device: opt.Device = "auto",
    threads: opt.Threads = None,
    seed: merging.Seed = 0,
    as_json: opt.Json = False,
    verbose: opt.Verbose = False,
) -> None:
    """Show what happens to which tensor by which rule, and the bytes, memory and time it takes. Nothing is written."""
    from mergekit_lr.verbs.merge.verb import plan_documents

    show_documents(
        plan_documents(
            recipe, dtype=dtype, shard_size=shard_size, memory=memory, device=device, threads=threads, seed=seed
        ),
        as_json=as_json,
        verbose=verbose,
    )


def show_documents(plans: Sequence[Any], *, as_json: bool, verbose: bool) -> None:
    """Print the plan of a recipe, or of each of its documents; as JSON one object, or a list of them."""
    from lrmerge.console import emit_json, out
    from mergekit_lr.verbs.merge.estimate import seconds

    made = [{**plan.to_json(), "seconds": seconds(plan)} for plan in plans]
    if as_json:
        emit_json(made[0] if len(made) == 1 else made)
        return
    for plan, one in zip(plans, made, strict=True):
        if len(made) > 1:
            out.print(f"{plan.recipe.document.name or 'the result'}:")
        show(one, verbose=verbose)


def show(made: dict[str, Any], *, verbose: bool) -> None:
    """Print a plan: its rules with how many tensors each has, or with -v every tensor, and the totals."""
    from collections import Counter

    from lrmerge.console import duration, err, out, size, to_read

    if verbose:
        for tensor in made["tensors"]:
            out.print(f"{tensor['state']} {tensor['name']}: {tensor['rule']}", soft_wrap=True)
    else:
        # A copy names its source, which differs from tensor to tensor.
        rules = Counter(f"{t['state']}: {t['rule']}" if t["state"] == "merged" else t["state"] for t in made["tensors"])
        for rule, count in rules.items():
            out.print(f"{count} {rule}", soft_wrap=True)
    for note in made["notes"]:
        err.print(f"note: {note}", style="yellow", soft_wrap=True)
    states = ", ".join(f"{count} {state}" for state, count in made["states"].items())
    written = f", {size(made['written_bytes'])} to write" if "written_bytes" in made else ""
    what = "adapters" if "space" in made else "models"
    # Never "0.0 s": a merge of small tensors is short, and how short is no matter.
    time = f"about {duration(max(made['seconds'], 0.1))} of arithmetic" if made["seconds"] else "no arithmetic"
    out.print(
        f"{made['method']} of {len(made['models'])} {what}: {states}; "
        f"{to_read(made['read_bytes'], made['download_bytes'])}{written}, "
        f"{made['batches']} batches on {made['device']} with {made['workers']} workers, {time}, peak memory "
        f"{size(made['peak_bytes'])}",
        soft_wrap=True,
    )
