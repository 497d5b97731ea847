"""Pages that are made when the site is built: one per method from its docstring, and the keys of every JSON output.

They land in docs/methods/ and docs/json/, which git ignores. A method that is added has its page with the next build.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from formulas import tex
from lrmerge.methods import inputs, values
from schemas import SCHEMAS, described
from sphinx.application import Sphinx

from mergekit_lr.methods.explanation import example, explain, reference
from mergekit_lr.methods.registry import Method, methods


def method_page(method: Method) -> str:
    """The page of one method, in Markdown."""
    said = explain(method)
    cited, link = reference(method)
    parts = [f"# {method.name}", said.summary, *said.body]
    parts += [f"$$\n{tex(line)}\n$$" for line in said.formula]
    facts = {
        "Use when": said.use_when,
        "Not when": said.not_when,
        "Cost": f"{said.cost} For T inputs (m, n); R is the total rank of adapters.",
        "Merges": inputs(method),
        "Spaces": ", ".join(method.spaces),
        "Source": f"[{cited}]({link})",
    }
    parts.append("\n".join(f"{term}\n: {_typeset(fact)}\n" for term, fact in facts.items()))
    if said.parameters:
        parts += ["## Parameters", _parameters(method, said.parameters)]
    parts += ["## Example", f"```yaml\n{example(method)}```"]
    return "\n\n".join(parts) + "\n"


def method_table() -> str:
    """All methods in one table."""
    rows = ["| method | does | merges |", "|---|---|---|"]
    rows += [
        f"| [{name}](methods/{name}.md) | {_escaped(explain(method).summary)} | {method.takes} |"
        for name, method in methods().items()
    ]
    return "\n".join(rows) + "\n"


def schema_page(verb: str) -> str:
    """The keys of one verb's JSON: a table for people, and the schema itself."""
    import json

    schema = SCHEMAS[verb]()
    parts = [f"# {verb}", described(schema), "## Schema", f"```json\n{json.dumps(schema, indent=1)}\n```"]
    return "\n\n".join(parts) + "\n"


def _parameters(method: Method, said: Any) -> str:
    rows = ["| parameter | default | what it does |", "|---|---|---|"]
    for name, text in said.items():
        parameter = method.parameters[name]
        default = "needed" if parameter.required else "" if parameter.default is None else f"`{parameter.default}`"
        rows.append(f"| `{name}` | {default} | {_escaped(f'{text} {values(parameter)}')} |")
    return "\n".join(rows)


def _typeset(text: str) -> str:
    """The text with every O(...) as a formula; brackets inside have partners, at most one deep."""
    parts = re.split(r"(O\((?:[^()]|\([^()]*\))*\))", text)
    return "".join(f"${tex(part)}$" if i % 2 else _escaped(part) for i, part in enumerate(parts))


def _escaped(text: str) -> str:
    """Plain text as Markdown that shows it as it is; links of our own keep their brackets."""
    for sign in "*_|<":
        text = text.replace(sign, f"\\{sign}") if "](http" not in text else text
    return text


def write(app: Sphinx) -> None:
    """Writes the pages whose text has changed, so that an unchanged one is not built again."""
    source = Path(app.srcdir)
    made = {source / "methods" / f"{name}.md": method_page(method) for name, method in methods().items()}
    made[source / "methods" / "table.txt"] = method_table()
    made |= {source / "json" / f"{verb}.md": schema_page(verb) for verb in SCHEMAS}
    for folder in ("methods", "json"):
        (source / folder).mkdir(exist_ok=True)
        for old in {*(source / folder).iterdir()} - made.keys():
            old.unlink()
    for path, text in made.items():
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            path.write_text(text, encoding="utf-8")


def setup(app: Sphinx) -> dict[str, Any]:
    """Makes the pages before the sources are read."""
    app.connect("builder-inited", write)
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
