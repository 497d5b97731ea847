"""Reading a recipe: YAML with line numbers, the schema, and what the schema cannot know; every mistake is one line.

A file may hold several documents; those before the last have a ``name`` by which later ones use their result. Without
``version`` mergekit's rules hold: an unknown key is a note and not an error.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import BaseModel, ValidationError

from mergekit_lr.errors import FormatError, LrmergeError, UsageError
from mergekit_lr.methods.registry import Method, find
from mergekit_lr.recipe.checks import check_parameters, check_patterns, check_space
from mergekit_lr.recipe.mergekit import defaults
from mergekit_lr.recipe.parameters import renamed
from mergekit_lr.recipe.schema import Document, ModuleEntry

Path_ = tuple[str | int, ...]
WAYS = ("models", "slices", "modules", "adapters")


class Place(NamedTuple):
    """Where a document stands: the file, and the line of every key and entry."""

    file: str
    lines: dict[Path_, int]

    def error(self, path: Path_, message: str) -> UsageError:
        """The error ``message`` at ``path`` of the document, with the line of the nearest thing that has one."""
        where = ".".join(map(str, path))
        while path and path not in self.lines:
            path = path[:-1]
        line = self.lines.get(path)
        return UsageError(f"{self.file}{f' line {line}' if line else ''}: {f'{where}: ' if where else ''}{message}")


class Module(NamedTuple):
    """A part of the model, or all of it, with its ``models`` or ``slices``; ``path`` is where they stand."""

    path: Path_
    entry: ModuleEntry


@dataclass(frozen=True)
class Recipe:
    """One checked document.

    document: its keys. method: what it runs. place: for errors. content: as it was given. notes: what was ignored.
    shared: parameters for all models. single: those of each of ``models`` or ``adapters``.
    """

    document: Document
    method: Method
    place: Place
    content: dict[str, Any]
    notes: tuple[str, ...] = ()
    shared: dict[str, Any] = field(default_factory=dict)

    @property
    def references(self) -> list[str]:
        """Every model that it names, each once, the base first."""
        doc = self.document
        named = [doc.base_model] if doc.base_model else []
        for _, entry in self.modules:
            named += [one.model for one in entry.models or ()]
            named += [source.model for part in entry.slices or () for source in part.sources]
            named += [part.base_model for part in entry.slices or () if part.base_model]
        return list(dict.fromkeys(named))

    @property
    def modules(self) -> list[Module]:
        """The ``modules``; one of everything where there are ``models`` or ``slices``, none of adapters."""
        doc = self.document
        if doc.adapters is not None:
            return []
        if doc.modules is None:
            return [Module((), ModuleEntry(models=doc.models, slices=doc.slices))]
        return [Module(("modules", name), entry) for name, entry in doc.modules.items()]

    def wants(self, name: str) -> bool:
        """Whether ``targets`` has tensor ``name`` merged."""
        targets = self.document.targets
        if any(re.search(pattern, name) for pattern in targets.exclude):
            return False
        return not targets.include or any(re.search(pattern, name) for pattern in targets.include)

    def changed(self, content: dict[str, Any]) -> Recipe:
        """The recipe with another content of the same form, at its place."""
        return _checked(content, self.place)


def read_recipes(source: str | Path | Mapping[str, Any] | Recipe) -> list[Recipe]:
    """The documents of a recipe file, or the one that a mapping is.

    Raises:
        FormatError: no such file, or no YAML.
        UsageError: an unknown key, a wrong value, a method or parameter that does not exist; with its line.
    """
    if isinstance(source, Recipe):
        return [source]
    if isinstance(source, Mapping):
        return [_checked(dict(source), Place("recipe", {}))]
    path = Path(source).expanduser()
    try:
        text = path.read_text(encoding="utf-8")
        nodes = [node for node in yaml.compose_all(text, Loader=yaml.SafeLoader) if node is not None]
    except FileNotFoundError:
        raise FormatError(f"{path}: no such file; a recipe is a YAML file") from None
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: no recipe that can be read ({error})") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        raise FormatError(f"{path}{where}: no YAML ({getattr(error, 'problem', None) or 'unreadable'})") from None
    if not nodes:
        raise FormatError(f"{path}: the recipe is empty")
    recipes = [_from_node(node, str(path)) for node in nodes]
    names = [recipe.document.name for recipe in recipes]
    for recipe, name in zip(recipes[:-1], names[:-1], strict=True):
        if name is None or names.count(name) > 1:
            raise recipe.place.error((), "every document before the last needs a 'name' of its own for later ones")
    return recipes


def _from_node(node: yaml.Node, file: str) -> Recipe:
    place = Place(file, dict(_lines(node, (), file, set())))
    loader = yaml.SafeLoader("")
    try:
        content = loader.construct_document(node)
    except yaml.YAMLError as error:
        raise FormatError(f"{file} line {node.start_mark.line + 1}: no YAML ({error.__class__.__name__})") from None
    finally:
        loader.dispose()
    if not isinstance(content, dict):
        raise place.error((), "a recipe is a mapping of keys such as merge_method and models")
    return _checked(content, place)


def _lines(node: yaml.Node, path: Path_, file: str, visited: set[int]) -> Iterator[tuple[Path_, int]]:
    """The line of everything in a document; what aliases name again counts where it stands first."""
    yield path, node.start_mark.line + 1
    if id(node) in visited:
        return
    visited.add(id(node))
    if isinstance(node, yaml.MappingNode):
        seen = set()
        for key, value in node.value:
            line = key.start_mark.line + 1
            if not isinstance(key, yaml.ScalarNode):
                raise UsageError(f"{file} line {line}: a key is a word, not a list or a mapping")
            if key.value in seen:
                raise UsageError(f"{file} line {line}: the key {key.value!r} stands here twice")
            seen.add(key.value)
            yield from _lines(value, (*path, key.value), file, visited)
            yield (*path, key.value), line
    elif isinstance(node, yaml.SequenceNode):
        for i, value in enumerate(node.value):
            yield from _lines(value, (*path, i), file, visited)


def _checked(content: dict[str, Any], place: Place) -> Recipe:
    document, notes = _validated(content, place)
    ways = [way for way in WAYS if getattr(document, way) is not None]
    if len(ways) != 1:
        found = " and ".join(ways) or "none"
        raise place.error((), f"exactly one of models, slices, modules and adapters is needed, got {found}")
    for name, entry in (document.modules or {}).items():
        if (entry.models is None) == (entry.slices is None):
            raise place.error(("modules", name), "a module has either models or slices")
    if document.tokenizer and document.tokenizer_source:
        raise place.error(("tokenizer_source",), "tokenizer and tokenizer_source say the same; give one")
    try:
        method = find(document.merge_method)
    except LrmergeError as error:
        raise place.error(("merge_method",), str(error)) from None
    assumed = defaults(method) if document.version is None else {}
    recipe = Recipe(document, method, place, content, tuple(notes), assumed | renamed(document.parameters))
    check_space(recipe)
    check_patterns(recipe)
    return replace(recipe, notes=(*recipe.notes, *check_parameters(recipe)))


def _validated(content: dict[str, Any], place: Place) -> tuple[Document, list[str]]:
    """The document; what mergekit would not have minded is left out and noted."""
    notes: list[str] = []
    while True:
        try:
            return Document.model_validate(content), notes
        except ValidationError as error:
            # A misspelt key is at once unknown and missing: the first says more.
            first = min(error.errors(), key=lambda e: e["type"] != "extra_forbidden")
            path = tuple(first["loc"])
            problem = place.error(path, _said(first, path))
            if first["type"] != "extra_forbidden" or "version" in content:
                raise problem from None
            notes.append(f"{problem}; ignored")
            content = _without(content, path)


def _said(error: Any, path: Path_) -> str:
    """What pydantic found, in our words."""
    match error["type"]:
        case "extra_forbidden":
            fields = _fields_at(path[:-1])
            near = difflib.get_close_matches(str(path[-1]), fields, 1, 0.0)
            return f"unknown key, did you mean {near[0]!r}?" if near else "unknown key"
        case "missing":
            return "is missing"
        case "value_error":
            return str(error["ctx"]["error"])
        case _:
            return f"{error['msg'][0].lower()}{error['msg'][1:]}, got {error['input']!r}"


def _fields_at(path: Path_) -> list[str]:
    """The keys that the schema knows at ``path``."""
    model: Any = Document
    for above, key in zip(("", *path), path, strict=False):
        if isinstance(key, str) and above != "modules":  # under modules the keys are names
            model = _model_in(model.model_fields[key].annotation)
    return list(model.model_fields)


def _model_in(annotation: Any) -> Any:
    """The model that an annotation such as ``list[ModelEntry] | None`` speaks of; None where there is none."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return annotation
    return next((found for part in get_args(annotation) if (found := _model_in(part)) is not None), None)


def _without(content: Any, path: Path_) -> Any:
    if isinstance(content, dict):
        return {k: _without(v, path[1:]) if k == path[0] else v for k, v in content.items() if (k,) != path}
    return [_without(v, path[1:]) if i == path[0] else v for i, v in enumerate(content)]
