"""Which tensors of which models become which tensor of the result: whole models, or slices of layers put in a row.

Layers come from the ranges of each slice; a tensor outside of them comes from the first slice's models if it is a
table of embeddings, from the last slice's otherwise.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from torch import Tensor

from mergekit_lr.errors import MismatchError
from mergekit_lr.methods.opcm import Tally
from mergekit_lr.recipe.parameters import arguments, renamed
from mergekit_lr.recipe.reading import Module, Path_, Recipe
from mergekit_lr.verbs.merge.alignment import Alignment
from mergekit_lr.verbs.merge.sources import Input, Source
from mergekit_lr.verbs.merge.vocabulary import Vocabulary


class Given(NamedTuple):
    """One model of a slice: its layers ``first`` to ``end``, and its own parameters."""

    source: Source
    first: int
    end: int
    parameters: dict[str, Any]


class Slice(NamedTuple):
    """Some layers of the result, the parameters that hold for all models there, narrowest first, and their base."""

    given: tuple[Given, ...]
    parameters: tuple[dict[str, Any], ...]
    base: Source | None


@dataclass(frozen=True, eq=False)
class Job:
    """One tensor of the result.

    inputs: of each model that is merged. base: what deltas are relative to, if anything. arguments: of the method.
    template: whose header the result has. merged: False for a tensor that ``targets`` leaves as the template's.
    alignment: how a table's rows come to the order of the result's vocabulary, where they are in another. earlier: how
    each matrix of the first input came about, where the recipe continues a merge.
    """

    name: str
    inputs: tuple[Input, ...]
    base: Input | None
    arguments: dict[str, Any]
    template: Input
    merged: bool = True
    alignment: Alignment | None = None
    earlier: tuple[Tally, ...] = ()

    def parts(self, used: Sequence[Input]) -> Callable[[Input, int, int], Tensor]:
        """What reads elements [start, stop) of one of ``used``, counted flat in the order of the result's rows."""
        if self.alignment is not None:
            return self.alignment.open(used).part
        parts = {item: item.source.parts(item.name) for item in used}
        return lambda item, start, stop: parts[item](start, stop)


def modules_of(recipe: Recipe, sources: dict[str, Source]) -> Iterator[tuple[Module, dict[str, Source]]]:
    """Every module of a recipe with its part of each model; one of the whole models where there are no ``modules``.

    A module takes the tensors in whose name it is a part (``vision_tower``). ``default``, and mergekit's
    ``text_decoder`` where no name has that part, take what no other does.

    Raises:
        UsageError: a module without a tensor, or a tensor without a module.
    """
    if recipe.document.modules is None:
        yield recipe.modules[0], sources
        return
    names = list(dict.fromkeys(name for source in sources.values() for name in (*source.headers, *source.aliases)))
    rest = dict.fromkeys(names)
    taken: dict[str, list[str]] = {}
    for module in recipe.document.modules:
        taken[module] = [name for name in rest if f".{module.strip('.')}." in f".{name}"]
        for name in taken[module]:
            del rest[name]
    remainder = next((m for m in taken if m in ("default", "text_decoder") and not taken[m]), None)
    if remainder is not None:
        taken[remainder] = list(rest)
    elif rest:
        raise recipe.place.error(
            ("modules",), f"tensor {next(iter(rest))} is in none of them; add default, which takes what is left"
        )
    for (path, entry), own in zip(recipe.modules, taken.values(), strict=True):
        if not own:
            parts = sorted({".".join(name.split(".")[:2]) for name in names})
            raise recipe.place.error(path, f"no tensor is in it; names begin with {', '.join(parts[:8])}")
        yield Module(path, entry), {ref: source.only(own) for ref, source in sources.items()}


def slices_of(recipe: Recipe, module: Module, sources: dict[str, Source]) -> list[Slice]:
    """The slices of a module; ``models`` are one slice of all layers.

    Raises:
        UsageError: a range outside of its model, or ranges of unequal length; with its line.
    """
    entry = module.entry
    base, shared = recipe.document.base_model, renamed(entry.parameters)
    if entry.models is not None:
        given = (Given(sources[m.model], 0, sources[m.model].layers.count, renamed(m.parameters)) for m in entry.models)
        return [Slice(tuple(given), (shared,), sources[base] if base else None)]
    found = []
    for i, part in enumerate(entry.slices or ()):
        given = []
        for j, one in enumerate(part.sources):
            source, (first, end) = sources[one.model], one.layer_range
            path: Path_ = (*module.path, "slices", i, "sources", j, "layer_range")
            if not 0 <= first < end <= source.layers.count:
                raise recipe.place.error(
                    path, f"[{first}, {end}] is no range of the {source.layers.count} layers of {one.model}"
                )
            if given and end - first != given[0].end - given[0].first:
                expected = given[0].end - given[0].first
                raise recipe.place.error(path, f"{end - first} layers, the first source of the slice has {expected}")
            given.append(Given(source, first, end, renamed(one.parameters)))
        own = part.base_model or base
        scopes = (renamed(part.parameters), shared)
        found.append(Slice(tuple(given), scopes, sources[own] if own else None))
    return found


def jobs_of(recipe: Recipe, slices: Sequence[Slice], vocabulary: Vocabulary | None = None) -> Iterator[Job]:
    """Every tensor of the result, in the order of the first model that has it; tables in the order of ``vocabulary``.

    Raises:
        MismatchError: a model lacks a tensor or has it in another shape. UsageError: too few or many models.
    """
    above = 0
    for part in slices:
        lead = part.given[0]
        count = lead.end - lead.first
        for name in _names(part):
            layer = lead.source.layers.of(name)
            if layer is None:
                where = slices[0] if name in lead.source.tables else slices[-1]
                if where is part:
                    yield _job(recipe, part, vocabulary, name, 0, name, 0.0)
            elif lead.first <= layer < lead.end:
                at = layer - lead.first
                depth = at / (count - 1) if count > 1 else 1.0
                yield _job(recipe, part, vocabulary, name, at, lead.source.layers.moved(name, above + at), depth)
        above += count


def _names(part: Slice) -> list[str]:
    """The tensors of a slice under the first model's names: its own, and those that others have besides."""
    lead = part.given[0]
    names = dict.fromkeys(lead.source.headers)
    others = part.given[1:] if part.base is None else (*part.given[1:], lead._replace(source=part.base))
    for given in others:
        offset = part.given[0].first - given.first
        for name in given.source.headers:
            layer = given.source.layers.of(name)
            if layer is None:
                names.setdefault(name)
            elif given.first <= layer < given.end:
                names.setdefault(given.source.layers.moved(name, layer + offset))
    return list(names)


def _job(
    recipe: Recipe,
    part: Slice,
    vocabulary: Vocabulary | None,
    name: str,
    at: int,
    out: str,
    t: float,
) -> Job:
    method, lead, base = recipe.method, part.given[0], part.base

    def own(source: Source, first: int) -> Input:
        moved = name if lead.source.layers.of(name) is None else source.layers.moved(name, first + at)
        return _present(source, moved, out)

    inputs = [own(given.source, given.first) for given in part.given]
    scopes = [given.parameters for given in part.given]
    origin = None
    if base is not None:
        listed = next((i for i, given in enumerate(part.given) if given.source is base), None)
        origin = inputs[listed] if listed is not None else own(base, lead.first)
        if method.name == "slerp":  # t = 0 is the base, wherever it stands in the list
            if listed is not None:
                inputs.insert(0, inputs.pop(listed))
                scopes.insert(0, scopes.pop(listed))
            else:
                inputs.insert(0, origin)
                scopes.insert(0, {})
        elif listed is not None and (method.takes == "deltas" or method.base != "none"):
            del inputs[listed], scopes[listed]
    used = origin if method.takes == "deltas" or method.base != "none" else None
    template = origin if origin is not None else inputs[0]
    every = list(dict.fromkeys(inputs if origin is None else [*inputs, origin]))
    aligned = vocabulary is not None and template.has_tokens
    _same_shape(every, out, aligned=aligned)
    merged = recipe.wants(out) and template.header[0].is_floating_point
    _count(recipe, len(inputs))
    found = arguments(method, scopes, [*part.parameters, recipe.shared], [i.name for i in inputs], out, t)
    alignment = vocabulary.alignment(every, out, base) if vocabulary is not None and aligned else None
    return Job(out, tuple(inputs), used, found, template, merged, alignment)


def _present(source: Source, name: str, out: str) -> Input:
    if name not in source.headers and name not in source.aliases:
        raise MismatchError(f"{source.ref}: has no tensor {name}, which {out} is merged from; is it of another model?")
    return Input(source, name)


def _same_shape(inputs: Sequence[Input], out: str, *, aligned: bool) -> None:
    first, shape = inputs[0], inputs[0].header[1]
    for other in inputs[1:]:
        found = other.header[1]
        if found == shape or (aligned and found[1:] == shape[1:] and other.has_tokens):
            continue
        vocabulary = found[1:] == shape[1:] and (first.has_tokens or other.has_tokens) and not aligned
        why = (
            "their vocabularies differ; write tokenizer_source: union, or base, into the recipe"
            if vocabulary
            else "they are of different models"
        )
        raise MismatchError(
            f"{out} has shape {list(shape)} in {first.source.ref} and {list(found)} in {other.source.ref}: {why}"
        )


def _count(recipe: Recipe, count: int) -> None:
    least, most = recipe.method.models
    if count < least or (most is not None and count > most):
        wanted = str(least) if least == most else f"{least} or more"
        beside = " beside base_model" if recipe.method.takes == "deltas" or recipe.method.base == "required" else ""
        way = next(w for w in ("models", "slices", "modules") if getattr(recipe.document, w) is not None)
        raise recipe.place.error((way,), f"{recipe.method.name} merges {wanted}{beside}, got {count}")
