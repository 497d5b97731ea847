"""Formulas without a network: TeX becomes MathML when the pages are built, by the converter that docutils brings.

The docstrings of methods hold formulas in plain text, for people at a terminal; ``tex`` makes TeX of such a line:
``_`` and ``^`` with one sign, a word or brackets behind them, Greek letters and functions by name, ``||x||`` for
norms, ``<a, b>`` for inner products. Other words of two letters and more are text.
"""

from __future__ import annotations

import re
from typing import Any

from docutils import nodes
from docutils.utils.math.latex2mathml import tex2mathml
from sphinx.application import Sphinx

GREEK = ("alpha", "beta", "gamma", "delta", "epsilon", "lambda", "rho", "sigma", "tau")
FUNCTIONS = (
    "angle", "argmin", "cos", "count", "diag", "floor", "inner", "KL", "max", "mean", "median", "min", "polar", "rank",
    "sgn", "sin", "softmax",
)  # fmt: skip
SIGNS = {
    "<-": r"\leftarrow ", ">=": r"\ge ", "!=": r"\ne ", "||": r"\Vert ", "|": r"\vert ", "*": r"\, ", "...": r"\ldots ",
    "sum": r"\sum ", "sqrt": r"\sqrt ", "'": "'", "<": r"\langle ", ">": r"\rangle ",
}  # fmt: skip
TOKEN = re.compile(r"[_^]|\.\.\.|<-|>=|!=|\|\||[A-Za-z]{2,}_[a-z]{4,}|[A-Za-z][A-Za-z-]+|[\d.]+|\S| +")


def tex(line: str) -> str:
    """The TeX of one formula in plain text."""
    # "a > b" compares, "<a, b>" does not.
    line = line.replace(" > ", " GREATER ")
    tokens = TOKEN.findall(line)
    out, i = [], 0
    while i < len(tokens):
        if tokens[i] in "_^" or tokens[i] == "sqrt":
            end = _argument(tokens, i + 1)
            inside = tokens[i + 1 : end]
            inside = inside[1:-1] if inside[0] == "(" else inside
            out.append(f"{SIGNS.get(tokens[i], tokens[i])}{{{tex(''.join(inside))}}}")
            i = end
        else:
            # Words have spaces between them, factors stand close together.
            near = any(_is_text(token) for token in tokens[max(i - 1, 0) : i + 2])
            out.append((r"\ " if near else r"\,") if tokens[i].isspace() else _word(tokens[i]))
            i += 1
    return "".join(out)


def _argument(tokens: list[str], start: int) -> int:
    """Where the index, power or radicand that begins at ``start`` ends: one token, or up to the bracket's partner."""
    if tokens[start] != "(":
        return start + 1
    depth = 0
    for end in range(start, len(tokens)):
        depth += {"(": 1, ")": -1}.get(tokens[end], 0)
        if depth == 0:
            return end + 1
    raise ValueError(f"brackets do not match in {''.join(tokens)!r}")


def _word(token: str) -> str:
    if token == "GREATER":
        return "> "
    if token in SIGNS:
        return SIGNS[token]
    if token in GREEK:
        return f"\\{token} "
    if token in FUNCTIONS:
        return rf"\operatorname{{{token}}}"
    return rf"\text{{{token}}}" if _is_text(token) else token


def _is_text(token: str) -> bool:
    known = token in SIGNS or token in GREEK or token in FUNCTIONS or token == "GREATER"
    return len(token) > 1 and token[0].isalpha() and not known


def _inline(self: Any, node: nodes.math) -> None:
    self.body.append(tex2mathml(node.astext()))
    raise nodes.SkipNode


def _block(self: Any, node: nodes.math_block) -> None:
    self.body.append(f'<div class="formula">{tex2mathml(node.astext(), as_block=True)}</div>')
    raise nodes.SkipNode


def setup(app: Sphinx) -> dict[str, Any]:
    """Registers the renderer under the name that HTML builders look for."""
    app.add_html_math_renderer("mathml", (_inline, None), (_block, None))
    app.config.html_math_renderer = "mathml"
    return {"version": "1", "parallel_read_safe": True, "parallel_write_safe": True}
