"""Which rule merges which part of adapters, and whether the result has a place for what comes out."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.registry import Method, find
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.convert.plan import HOLDS_ADDED
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_sources import Opened
from mergekit_lr.verbs.merge.plan import rule_in_words

# Methods whose last step is a truncation: we do that step ourselves, so that what it loses is measured.
TRUNCATING = {"svd": "task_arithmetic", "core_space": "core_space"}


def is_dense(recipe: Recipe, step: Step) -> bool:
    """Whether the merged change of a step is a whole matrix, not factors."""
    if step.part != "change" or len(step.size) < 2:
        return False
    return not step.factored or (recipe.document.space == "full" and not recipe.method.factored)


def in_full(method: Method, arguments: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """The method that merges what is no factors, with its arguments: the same one where it takes whole deltas.

    Core Space's inner method; of methods that are exact sums of factors the sum; of averages of factors the average.
    """
    if method.takes != "factors":
        name = TRUNCATING.get(method.name, method.name)
        return name, {key: value for key, value in arguments.items() if key in find(name).parameters}
    inner = str(arguments.get("inner", "task_arithmetic")) if method.name == "core_space" else ""
    name = inner or ("task_arithmetic" if method.name in ("cat", "peft") else "linear")
    return name, {key: value for key, value in arguments.items() if key in find(name).parameters and key != "rank"}


def rule_of(method: Method, step: Step) -> str:
    """What happens in a step, in words."""
    if step.averaged:
        return rule_in_words("mean", {k: v for k, v in step.arguments.items() if k == "weights"})
    if step.part == "change" and step.factored:
        return rule_in_words(method.name, step.arguments)
    return rule_in_words(*in_full(method, step.arguments))


def check_places(
    recipe: Recipe, opened: Sequence[Opened], steps: Iterable[Step], kind: str, to: str, base: Base | None
) -> None:
    """Refuse now what the result would have no place for at the end.

    Raises:
        UsageError: naming the parameter, and what to ask for instead.
    """
    output = recipe.document.output
    method, place = recipe.method, (("output",) if "output" in recipe.content else ())
    limited = any(limit is not None for limit in (output.rank, output.energy, output.size))
    for step in steps if kind == "adapter" else ():
        if step.part in ("saved", "rows") and to != "peft":
            raise recipe.place.error(("output", "format"), f"{to} files have no place for {step.label}; choose peft")
        if step.part == "change" and len(step.size) < 2 and to == "peft" and base is None:
            raise recipe.place.error(place, f"{step.name}: PEFT holds no difference of a vector, give base_model")
        own = method.name in TRUNCATING and "rank" in step.arguments
        if not is_dense(recipe, step) or limited or own or to in HOLDS_ADDED or _of_low_rank(recipe, step):
            continue
        if step.factored:
            spaces = [f"space: {space}" for space in method.spaces if space != "full"]
            why = f"{method.name} of whole deltas is of full rank, no adapter; give {' or '.join([*spaces, ''])}"
        else:
            ref = next(one for one, own in zip(opened, step.given, strict=True) if not isinstance(own, LowRank | None))
            why = f"{step.name}: its change by {ref.ref} ({ref.kind}) is of full rank, no adapter; give "
        raise recipe.place.error(place, f"{why}output.rank, or output.kind: model")


def _of_low_rank(recipe: Recipe, step: Step) -> bool:
    """Whether changes that are still to be computed turn out as factors, and the method keeps them so."""
    if recipe.document.space == "full" and not recipe.method.factored:
        return False
    return all(isinstance(one() if callable(one) else one, LowRank | None) for one in step.given)
