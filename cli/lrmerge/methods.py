"""``lrmerge methods [NAME]``: the merge methods, or one of them with its parameters."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.methods.registry import Method, Parameter


MERGEKIT = {"weight": "weights", "lambda": "scale"}  # its names, which recipes may use


def methods(
    name: Annotated[str | None, typer.Argument(metavar="[NAME]", help="A method, to explain its parameters.")] = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List the merge methods, or explain one: what it does, its paper, its parameters with their defaults."""
    from lrmerge.console import emit_json, out, table, word
    from lrmerge.console import name as column
    from mergekit_lr.methods.registry import find
    from mergekit_lr.methods.registry import methods as known

    if schema:
        from mergekit_lr.recipe.schema import Document

        emit_json(Document.model_json_schema())
        return
    found = {name: find(name)} if name is not None else known()
    if as_json:
        emit_json({key: _as_json(method) for key, method in found.items()})
    elif name is not None:
        _explain(found[name])
    else:
        rows = table(word("method"), word("merges"), word("paper"), column("what it does"))
        for key, method in found.items():
            rows.add_row(key, method.takes, method.paper, method.description)
        out.print(rows)


def _as_json(method: Method) -> dict[str, Any]:
    return {
        "description": method.description,
        "paper": method.paper,
        "takes": method.takes,
        "spaces": list(method.spaces),
        "base": method.base,
        "models": list(method.models),
        "random": method.random,
        "parameters": {key: _parameter(p) for key, p in method.parameters.items() if p.kind != "tensor"},
    }


def _parameter(parameter: Parameter) -> dict[str, Any]:
    from math import isfinite

    return {
        "kind": parameter.kind,
        "default": parameter.default,
        "required": parameter.required,
        "per_model": parameter.per_model,
        "choices": list(parameter.choices),
        "low": parameter.low if isfinite(parameter.low) else None,
        "high": parameter.high if isfinite(parameter.high) else None,
    }


def _explain(method: Method) -> None:
    from lrmerge.console import headline, out, table, word
    from lrmerge.console import name as column

    headline(method.name, method.description)
    paper = f"arXiv {method.paper}" if method.paper[:1].isdigit() and "/" not in method.paper else method.paper
    least, most = method.models
    count = str(least) if least == most else f"{least} or more"
    base = {"deltas": "base_model needed for models"}.get(method.takes, f"base_model {method.base}")
    out.print(f"{paper}; merges {count} ({method.takes}, {base}); spaces: {', '.join(method.spaces)}", soft_wrap=True)
    rows = table(word("parameter"), word("default"), word("set"), column("values"))
    for key, parameter in method.parameters.items():
        if parameter.kind == "tensor":
            continue
        default = "needed" if parameter.required else "" if parameter.default is None else str(parameter.default)
        rows.add_row(key, default, "per model" if parameter.per_model else "once", _values(parameter))
    out.print(rows)
    if mergekit := [f"{theirs} for {ours}" for theirs, ours in MERGEKIT.items() if ours in method.parameters]:
        out.print(f"a recipe may say {', '.join(mergekit)}", style="dim")


def _values(parameter: Parameter) -> str:
    if parameter.choices:
        return ", ".join(map(str, parameter.choices))
    low, high = f"{parameter.low:g}", f"{parameter.high:g}"
    if high != "inf":
        return f"number from {low} to {high}"
    return "true, false" if parameter.kind == "flag" else parameter.kind
