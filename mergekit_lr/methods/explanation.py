"""What the docstring of a method says, in parts: for the terminal, the pages of the documentation, whoever asks.

A docstring has a first line, perhaps more paragraphs, and these sections, of which none may be missing:

    Formula:    one formula a line, in plain text: ``_`` and ``^`` for indices and powers, Greek letters by name
    Args:       every parameter
    Use when:   for what it is the right choice
    Not when:   for what another one is
    Cost:       in operations, for T inputs (m, n), or of total rank R
    Example:    parameters of a recipe, as a YAML mapping

"as for ``name``" behind the names of parameters stands for what the method ``name`` says of them.
"""

from __future__ import annotations

import inspect
import re
from collections.abc import Mapping
from dataclasses import dataclass

from mergekit_lr.methods.registry import Method, find

_SECTION = re.compile(r"^(Formula|Args|Use when|Not when|Cost|Example|Raises|Returns):$", re.MULTILINE)
_ARGUMENT = re.compile(r"^((?:\w+, )*\w+): (.*)$")
_AS_FOR = re.compile(r"as for ``(\w+)``\.")
_SOURCES = {
    "mergekit": "https://github.com/arcee-ai/mergekit",
    "PEFT": "https://github.com/huggingface/peft",
    "Eckart-Young": "https://doi.org/10.1007/BF02288367",
}


@dataclass(frozen=True)
class Explanation:
    """The parts of a docstring.

    summary: its first line. body: further paragraphs. formula: the lines. parameters: what each one does, by name.
    use_when, not_when, cost: a sentence or two. example: parameters of a recipe, as YAML.
    """

    summary: str
    body: tuple[str, ...]
    formula: tuple[str, ...]
    parameters: Mapping[str, str]
    use_when: str
    not_when: str
    cost: str
    example: str


def explain(method: Method) -> Explanation:
    """What a method does, read from its docstring.

    Raises:
        KeyError: a section is missing.
    """
    head, sections = _sections(inspect.getdoc(method.function) or "")
    summary, *body = [_line(paragraph) for paragraph in head.split("\n\n")]
    said = _parameters(sections.get("Args", ""))
    return Explanation(
        summary=summary,
        body=tuple(body),
        formula=tuple(line.strip() for line in sections["Formula"].splitlines()),
        parameters={name: _line(said[name]) for name, p in method.parameters.items() if p.kind != "tensor"},
        use_when=_line(sections["Use when"]),
        not_when=_line(sections["Not when"]),
        cost=_line(sections["Cost"]),
        example=_line(sections["Example"]),
    )


def example(method: Method) -> str:
    """A recipe with the parameters of the docstring's example, for two inputs where the method takes so many."""
    lines = [f"merge_method: {method.name}"]
    count = 1 if method.models[1] == 1 else 2
    if method.takes == "factors":
        lines += ["adapters:", "  - adapter: org/math-lora", "  - adapter: org/code-lora"]
    else:
        if method.takes == "deltas" or method.base == "required":
            lines += ["base_model: org/base"]
        lines += ["models:", *[f"  - model: org/{name}" for name in ("math", "code")[:count]]]
    given = explain(method).example
    return "\n".join([*lines, *([f"parameters: {given}"] if given != "{}" else [])]) + "\n"


def reference(method: Method) -> tuple[str, str]:
    """Where a method comes from: how to cite it in a word, and a link."""
    paper = method.paper
    if paper in _SOURCES:
        return paper, _SOURCES[paper]
    if "/" in paper:
        return f"doi {paper}", f"https://doi.org/{paper}"
    return f"arXiv {paper}", f"https://arxiv.org/abs/{paper}"


def _sections(text: str) -> tuple[str, dict[str, str]]:
    """What stands before the first section, and the text of each, without the indentation."""
    marks = list(_SECTION.finditer(text))
    ends = [mark.start() for mark in marks[1:]] + [len(text)]
    found = {m[1]: inspect.cleandoc(text[m.end() : end]) for m, end in zip(marks, ends, strict=True)}
    return text[: marks[0].start() if marks else len(text)].strip(), found


def _parameters(text: str) -> dict[str, str]:
    """The text of every parameter of ``Args``."""
    found: dict[str, str] = {}
    names: list[str] = []
    for line in text.splitlines():
        if start := _ARGUMENT.match(line):
            names = start[1].split(", ")
            found |= dict.fromkeys(names, start[2])
        else:
            found |= {name: f"{found[name]} {line.strip()}" for name in names}
    for name, said in found.items():
        if other := _AS_FOR.fullmatch(said):
            found[name] = _parameters(_sections(inspect.getdoc(find(other[1]).function) or "")[1]["Args"])[name]
    return found


def _line(text: str) -> str:
    """One line without the marks of a docstring."""
    return re.sub(r"(?::\w+:)?`+([^`]*)`+", r"\1", " ".join(text.split()))
