"""What the schema cannot know of a recipe: its method's parameters, and that inputs, space and output go together."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mergekit_lr.errors import LrmergeError
from mergekit_lr.recipe.mergekit import WITHOUT_EFFECT
from mergekit_lr.recipe.parameters import check_setting, known, renamed

if TYPE_CHECKING:
    from mergekit_lr.recipe.reading import Path_, Recipe


def _scopes(recipe: Recipe) -> Iterator[tuple[Path_, dict[str, Any], bool]]:
    """Every ``parameters`` with its path, and whether it belongs to one model."""
    doc = recipe.document
    yield ("parameters",), doc.parameters or {}, False
    for i, entry in enumerate(doc.adapters or ()):
        yield ("adapters", i, "parameters"), entry.parameters or {}, True
    for at, module in recipe.modules:
        yield (*at, "parameters"), module.parameters or {}, False
        for i, entry in enumerate(module.models or ()):
            yield (*at, "models", i, "parameters"), entry.parameters or {}, True
        for i, part in enumerate(module.slices or ()):
            yield (*at, "slices", i, "parameters"), part.parameters or {}, False
            for j, source in enumerate(part.sources):
                yield (*at, "slices", i, "sources", j, "parameters"), source.parameters or {}, True


def check_parameters(recipe: Recipe) -> list[str]:
    """Raise for a parameter that the method does not have or whose value it does not take; notes on ignored ones."""
    notes, method = [], recipe.method
    lenient = recipe.document.version is None
    try:
        options = known(method, [recipe.shared])
    except LrmergeError as error:
        raise recipe.place.error(("parameters", "inner"), str(error)) from None
    for path, scope, single in _scopes(recipe):
        for given, setting in scope.items():
            key = next(iter(renamed({given: None})))
            here = (*path, given)
            if given in WITHOUT_EFFECT and lenient:
                continue
            if key not in options:
                near = difflib.get_close_matches(key, options, 1, 0.0)
                hint = f"did you mean {near[0]!r}?" if near else "it has none"
                problem = recipe.place.error(here, f"{method.name} has no such parameter, {hint}")
            elif single and not options[key].per_model:
                problem = recipe.place.error(here, f"{method.name} takes one for all models; move it to parameters")
            else:
                try:
                    check_setting(setting, key, options[key], method)
                except LrmergeError as error:
                    raise recipe.place.error(here, str(error)) from None
                continue
            if not lenient:
                raise problem
            notes.append(f"{problem}; ignored")
    scopes = [scope for path, scope, _ in _scopes(recipe) if path[0] not in ("models", "adapters")]
    for key, parameter in method.parameters.items():
        if parameter.required and not any(key in renamed(scope) for scope in scopes):
            raise recipe.place.error(("merge_method",), f"{method.name} needs the parameter {key!r}")
    return notes


def check_space(recipe: Recipe) -> None:
    """Raise where inputs, space and output do not go with the method or with each other."""
    doc, method, error = recipe.document, recipe.method, recipe.place.error
    chosen = [key for key in ("rank", "energy", "size") if getattr(doc.output, key) is not None]
    if len(chosen) > 1:
        raise error(("output", chosen[1]), f"{chosen[0]} chooses the rank already; give one")
    ours = [key for key in ("format", "target", "component") if getattr(doc.output, key) is not None]
    if ours and (doc.adapters is None or doc.output.kind == "model"):
        raise error(("output", ours[0]), "is of adapters; the result is a model")
    if doc.output.target is not None and doc.output.format not in (None, "peft"):
        raise error(("output", "target"), f"{doc.output.target} reads PEFT folders; leave format out")
    if doc.output.dora == "fold" and doc.base_model is None:
        raise error(("output", "dora"), "a DoRA rescales the base's own weights; give base_model")
    if doc.adapters is None:
        if doc.space != "full":
            raise error(("space",), f"the space {doc.space!r} is for adapters; models are merged in full")
        if method.takes == "factors":
            raise error(("merge_method",), f"{method.name} merges adapters; list them under adapters")
        if doc.output.kind == "adapter" or chosen:
            key = "kind" if doc.output.kind == "adapter" else chosen[0]
            raise error(("output", key), "models merge into a model; extract takes an adapter out of it")
    else:
        if doc.space not in method.spaces:
            spaces = ", ".join(method.spaces)
            raise error(("space",), f"{method.name} does not run in the space {doc.space!r}; choose {spaces}")
        if method.takes == "weights" and (method.base == "required" or not method.factored):
            raise error(("merge_method",), f"{method.name} merges whole weights; list models, each as BASE+ADAPTER")
        if doc.output.kind == "model" and doc.base_model is None:
            raise error(("output", "kind"), "a model needs the base_model that the adapters go onto")
        if doc.output.kind != "model" and doc.output.shard_size is not None:
            raise error(("output", "shard_size"), "an adapter is one file; shard_size is for kind: model")
        if doc.tokenizer or doc.tokenizer_source or doc.chat_template:
            key = next(k for k in ("tokenizer", "tokenizer_source", "chat_template") if getattr(doc, k))
            raise error((key,), "adapters bring no tokenizer; leave it out")


def check_patterns(recipe: Recipe) -> None:
    """Raise for a target that is no regular expression."""
    for key in ("include", "exclude"):
        for i, pattern in enumerate(getattr(recipe.document.targets, key)):
            try:
                re.compile(pattern)
            except re.error as error:
                problem = f"{pattern!r} is no regular expression: {error}"
                raise recipe.place.error(("targets", key, i), problem) from None
