"""What ``push:`` in a recipe asks: the result onto the Hub, once it is written."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lr.errors import LrmergeError
from mergekit_lr.graph.run import Progress
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.report.merging import MergeReport
from mergekit_lr.verbs.push import check_login, push


def check_push(before: Sequence[Recipe], last: Recipe, out: str | Path | None) -> None:
    """See that the push can be made, before the merge is.

    Raises:
        UsageError: it is asked for a result that is not on the disk, or not the last one.
        HubError: there is no token, or the Hub does not take it.
    """
    for recipe in before:
        if recipe.document.push is not None:
            raise recipe.place.error(("push",), "only the last document's result can be pushed")
    options = _options(last)
    if options is None:
        return
    if out is None:
        raise last.place.error(("push",), "a result in memory cannot be pushed; name OUT")
    if Path(out).suffix == ".safetensors":
        raise last.place.error(("push",), "a folder is pushed, and OUT is one file; choose the format peft")
    check_login(options["repo"])


def pushed(report: MergeReport, recipe: Recipe, progress: Callable[[Progress], None] | None) -> MergeReport:
    """Push the result where the recipe asks for it; the report with the address.

    Raises:
        LrmergeError: it cannot be pushed; the result is whole on the disk.
    """
    options = _options(recipe)
    if options is None or report.out is None:
        return report
    repo = options.pop("repo")
    try:
        sent = push(report.out, repo, progress=progress, **options)
    except LrmergeError as error:
        does = f"lrmerge push {report.out} {repo} does it"
        raise type(error)(f"{report.out} is written, and not pushed ({does}): {error}") from None
    return replace(report, notes=(*report.notes, *sent.notes, f"pushed to {sent.pull_request or sent.url}"))


def _options(recipe: Recipe) -> dict[str, Any] | None:
    asked = recipe.document.push
    return {"repo": asked} if isinstance(asked, str) else None if asked is None else asked.model_dump()
