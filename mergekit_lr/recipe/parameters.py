"""Parameters of a recipe: one value per tensor from gradients, filters and the scopes that may set it.

A setting is a number, flag or word; a list of those, a gradient over the layers of a slice; or a list of
``{filter, value}``, of which the first whose filter is part of the tensor's name counts (``*`` or none: always;
``re:``: a regular expression). The narrowest scope that has a value wins: model, slice, recipe, the method's default.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from mergekit_lr.errors import UsageError
from mergekit_lr.methods.registry import Method, Parameter, canonical, find

Scope = Mapping[str, Any]


def value_of(setting: Any, name: str, t: float, parameter: Parameter) -> Any:
    """The value of ``setting`` for tensor ``name`` at ``t`` from 0 (first layer) to 1 (last); None where none fits.

    Numbers are interpolated linearly between the entries of a gradient, anything else is stepped.
    """
    if isinstance(setting, Mapping):
        setting = [setting]
    if not isinstance(setting, list):
        return _typed(setting, parameter)
    if setting and isinstance(setting[0], Mapping):
        chosen = next((entry for entry in setting if _fits(entry.get("filter"), name)), None)
        return None if chosen is None else value_of(chosen["value"], name, t, parameter)
    values = [_typed(value, parameter) for value in setting]
    place = t * (len(values) - 1)
    low = int(place)
    if parameter.kind not in ("number", "integer"):
        return values[low]
    exact = values[low] + (place - low) * (values[min(low + 1, len(values) - 1)] - values[low])
    return round(exact) if parameter.kind == "integer" else float(exact)


def arguments(
    method: Method, own: Sequence[Scope], shared: Sequence[Scope], names: Sequence[str], name: str, t: float
) -> dict[str, Any]:
    """The arguments of ``method`` for one tensor.

    Args:
        method: what is run. own: the scope of each model. shared: wider scopes, the narrowest first; all under
            canonical names. names: of the tensor in each model. name: of the tensor in the result. t: its depth.
    """
    found: dict[str, Any] = {}
    for key, parameter in known(method, shared).items():
        if not parameter.per_model:
            value = _first(shared, key, name, t, parameter)
            if value is not None:
                found[key] = value
            continue
        values = [_first((mine, *shared), key, n, t, parameter) for mine, n in zip(own, names, strict=True)]
        if any(value is not None for value in values):
            found[key] = [parameter.default if value is None else value for value in values]
            if None in found[key]:
                raise UsageError(f"{method.name}: {key!r} is set for some models of {name}; set it for all of them")
    return found


def known(method: Method, shared: Sequence[Scope]) -> dict[str, Parameter]:
    """The parameters that a recipe may set: the method's, and those of the method that it runs inside."""
    inner = next((str(scope["inner"]) for scope in shared if "inner" in scope), "task_arithmetic")
    further = find(inner).parameters if method.inner and "inner" in method.parameters else {}
    return {key: p for key, p in {**further, **method.parameters}.items() if p.kind != "tensor"}


def check_setting(setting: Any, key: str, parameter: Parameter, method: Method) -> None:
    """Raise for a setting of the wrong form or with a value that the method does not take.

    Raises:
        UsageError: naming the parameter, the value and what it should be.
    """
    for leaf in _leaves(setting, key):
        if key not in method.parameters:  # of the inner method, which checks it when it runs
            continue
        others = {p.name: 1 for p in method.parameters.values() if p.required}
        method.bound({**others, key: _typed(leaf, parameter)}, 1)


def _leaves(setting: Any, key: str) -> Iterator[Any]:
    entries = setting if isinstance(setting, list) else [setting]
    if not entries:
        raise UsageError(f"{key!r}: an empty list is no gradient")
    mappings = [isinstance(entry, Mapping) for entry in entries]
    if any(mappings) and not all(mappings):
        raise UsageError(f"{key!r}: a list holds either values (a gradient) or {{filter, value}}, not both")
    for entry in entries:
        if not isinstance(entry, Mapping):
            if isinstance(entry, list):
                raise UsageError(f"{key!r}: a list inside a list is no gradient")
            yield entry
            continue
        if unknown := entry.keys() - {"filter", "value"}:
            raise UsageError(f"{key!r}: an entry has 'filter' and 'value', not {min(map(str, unknown))!r}")
        if "value" not in entry:
            raise UsageError(f"{key!r}: the entry with the filter {entry.get('filter')!r} has no 'value'")
        pattern = entry.get("filter")
        if pattern is not None and not isinstance(pattern, str):
            raise UsageError(f"{key!r}: a filter is a part of a tensor's name, got {pattern!r}")
        if pattern is not None and pattern.startswith("re:"):
            _compiled(key, pattern[3:])
        yield from _leaves(entry["value"], key)


def _compiled(key: str, pattern: str) -> None:
    try:
        re.compile(pattern)
    except re.error as error:
        raise UsageError(f"{key!r}: the filter {pattern!r} is no regular expression: {error}") from None


def _typed(value: Any, parameter: Parameter) -> Any:
    """YAML reads 1e-5 as a word; where a number is wanted it is one."""
    if parameter.kind == "number" and isinstance(value, str):
        try:
            return float(value)
        except ValueError:
            return value
    return value


def _fits(pattern: str | None, name: str) -> bool:
    if pattern is None or pattern == "*":
        return True
    return bool(re.search(pattern[3:], name)) if pattern.startswith("re:") else pattern in name


def _first(scopes: Sequence[Scope], key: str, name: str, t: float, parameter: Parameter) -> Any:
    found = (value_of(scope[key], name, t, parameter) for scope in scopes if key in scope)
    return next((value for value in found if value is not None), None)


def renamed(scope: Mapping[str, Any] | None) -> dict[str, Any]:
    """A scope under our names of parameters."""
    return canonical(scope or {})
