"""``lrmerge methods [NAME]``: the merge methods, or one of them with its parameters."""

from __future__ import annotations

import re
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.table import Column

from lrmerge import options as opt

if TYPE_CHECKING:
    from mergekit_lr.methods.registry import Method, Parameter


MERGEKIT = {"weight": "weights", "lambda": "scale"}  # its names, which recipes may use


def known_names(beginning: str) -> list[str]:
    """Names of methods for the shell's completion, read from the files: importing them would import torch."""
    import mergekit_lr.methods as package

    files = sorted(Path(package.__path__[0]).glob("*.py"))
    names = (name for file in files for name in re.findall(r'^@method\(\s*"(\w+)"', file.read_text(), re.MULTILINE))
    return sorted(name for name in names if name.startswith(beginning))


Name = Annotated[
    str | None,
    typer.Argument(metavar="[NAME]", help="A method, to explain its parameters.", autocompletion=known_names),
]


def methods(
    name: Name = None,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes.")] = False,
    as_json: opt.Json = False,
) -> None:
    """List the merge methods, or explain one: what it does, its paper, its parameters with their defaults."""
    from lrmerge.console import emit_json, out, table, word
    from mergekit_lr.methods.explanation import explain
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
        rows = table(word("method"), word("merges"), word("paper"), text("what it does"))
        for key, method in found.items():
            paper = "doi" if "/" in method.paper else method.paper
            rows.add_row(key, method.takes, paper, explain(method).summary)
        out.print(rows)


def text(header: str) -> Column:
    """A column of sentences, wrapped."""
    return Column(header, ratio=1)


def _as_json(method: Method) -> dict[str, Any]:
    from dataclasses import asdict

    from mergekit_lr.methods.explanation import example, explain, reference

    said = asdict(explain(method))
    texts = said.pop("parameters")
    return {
        "description": said.pop("summary"),
        "paper": method.paper,
        "link": reference(method)[1],
        "takes": method.takes,
        "spaces": list(method.spaces),
        "base": method.base,
        "models": list(method.models),
        "random": method.random,
        **said,
        "parameters": {key: _parameter(method.parameters[key]) | {"text": text} for key, text in texts.items()},
        "recipe": example(method),
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
    from rich.padding import Padding

    from lrmerge.console import out, table, word
    from mergekit_lr.methods.explanation import example, explain, reference

    said = explain(method)
    out.print(f"{method.name}: {said.summary}", style="bold")
    for paragraph in said.body:
        out.print(f"\n{paragraph}")
    out.print(Padding("\n".join(said.formula), (1, 0, 1, 4)))

    facts = table(word(""), text(""))
    facts.show_header = False
    facts.add_row("use when", said.use_when)
    facts.add_row("not when", said.not_when)
    facts.add_row("cost", said.cost)
    facts.add_row("merges", inputs(method))
    facts.add_row("spaces", ", ".join(method.spaces))
    facts.add_row("paper", ", ".join(reference(method)))
    out.print(facts)

    if said.parameters:
        rows = table(word("parameter"), word("default"), text("what it does"))
        for key, meaning in said.parameters.items():
            parameter = method.parameters[key]
            default = "needed" if parameter.required else "" if parameter.default is None else str(parameter.default)
            rows.add_row(key, default, f"{meaning} {values(parameter)}".rstrip())
        out.print()
        out.print(rows)
    if mergekit := [f"{theirs} for {ours}" for theirs, ours in MERGEKIT.items() if ours in said.parameters]:
        out.print(f"a recipe may say {', '.join(mergekit)}", style="dim")
    out.print("\na recipe:")
    out.print(Padding(example(method).rstrip(), (1, 0, 0, 4)))


def inputs(method: Method) -> str:
    """What a method merges, and how many, in words."""
    least, most = method.models
    count = str(least) if least == most else f"{least} or more"
    match method.takes:
        case "factors":
            return f"{count} adapters"
        case "deltas":
            return f"{count} models of one base_model, or adapters"
    base = {"required": "and a base_model", "optional": "with or without a base_model", "none": ""}[method.base]
    adapters = ", or adapters" if method.factored and method.base != "required" else ""
    return f"{count} {'model' if most == 1 else 'models'} {base}".rstrip() + adapters


def values(parameter: Parameter) -> str:
    """The range or the choices, and whether models may differ, in brackets; empty where there is nothing to say."""
    said = []
    if parameter.choices:
        said.append(" | ".join(map(str, parameter.choices)))
    elif parameter.high != float("inf"):
        said.append(f"{parameter.low:g} to {parameter.high:g}")
    if parameter.per_model:
        said.append("per model")
    return f"({'; '.join(said)})" if said else ""
