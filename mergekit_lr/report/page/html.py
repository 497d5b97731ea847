"""The page as one file: template, style, script, the drawing library and the figures, and a policy that lets it load
nothing."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Sequence
from functools import cache
from importlib.resources import files

from mergekit_lr.errors import printable
from mergekit_lr.report.page.content import Content
from mergekit_lr.report.page.sections import Section

PARTS = files("mergekit_lr.report.page")


def page(content: Content, sections: Sequence[Section]) -> str:
    """The HTML text. Everything in it that comes from a file is escaped."""
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    library, script, style = _library(), _part("page.js"), _part("page.css")
    environment = Environment(autoescape=True, undefined=StrictUndefined, finalize=_shown)
    return environment.from_string(_part("page.html")).render(
        content=content,
        sections=sections,
        policy=_policy(library, script),
        library=Markup(library),
        script=Markup(script),
        style=Markup(style),
    )


def _shown(value: object) -> object:
    """Text without control characters, but for the lines of a recipe."""
    return "\n".join(map(printable, value.split("\n"))) if type(value) is str else value


def _policy(*scripts: str) -> str:
    """Only these scripts run, by their digests, and nothing is loaded; Vega compiles its expressions."""
    digests = " ".join(f"'sha256-{base64.b64encode(hashlib.sha256(s.encode()).digest()).decode()}'" for s in scripts)
    return (
        f"default-src 'none'; script-src {digests} 'unsafe-eval'; style-src 'unsafe-inline'; img-src data:; "
        "base-uri 'none'; form-action 'none'"
    )


def _part(name: str) -> str:
    return (PARTS / name).read_text(encoding="utf-8")


@cache
def _library() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script."""
    from vl_convert import javascript_bundle

    return javascript_bundle("window.vegaEmbed = vegaEmbed;")
