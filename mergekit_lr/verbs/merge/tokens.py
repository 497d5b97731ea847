"""What a recipe says of single tokens, under ``tokenizer: {tokens: {TOKEN: {source: ..., force: ...}}}``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from mergekit_lr.errors import UsageError
from mergekit_lr.recipe.mergekit import as_reference
from mergekit_lr.recipe.reading import Recipe

WAYS = (
    "a model, {kind: zero}, {kind: model_token, model: MODEL, token: TOKEN} or {kind: model_token, model: MODEL, "
    "token_id: N}"
)


class Rule(NamedTuple):
    """The row that models without a token take, and with ``force`` all models.

    source: the model whose row it is; "zero"; or None: as for any other token. token: whose row of that model it is.
    row: its number, where the recipe gives that or once it was looked up.
    """

    source: str | None
    token: str
    row: int | None
    force: bool


def rules_of(recipe: Recipe) -> dict[str, Rule]:
    """The rule of every token that the recipe speaks of.

    Raises:
        UsageError: with its line: a source of another form, or no model of the recipe.
    """
    entries = (recipe.document.tokenizer.tokens if recipe.document.tokenizer is not None else None) or {}
    return {token: _rule(recipe, token, entry) for token, entry in entries.items()}


def looked_up(recipe: Recipe, rules: Mapping[str, Rule], ids: Mapping[str, Mapping[str, int]]) -> dict[str, Rule]:
    """``rules`` with the rows of the tokens that they name; ``ids``: model to its tokens with their numbers.

    Raises:
        UsageError: with its line: the model has no such token.
    """
    found = {}
    for token, rule in rules.items():
        held = ids.get(rule.source or "")
        if held is not None and rule.row is None:
            if rule.token not in held:
                path = ("tokenizer", "tokens", token, "source")
                raise recipe.place.error(path, f"{rule.source} has no token {rule.token!r}")
            rule = rule._replace(row=held[rule.token])
        found[token] = rule
    return found


def _rule(recipe: Recipe, token: str, entry: Any) -> Rule:
    def error(message: str, *more: str) -> UsageError:
        return recipe.place.error(("tokenizer", "tokens", token, *more), message)

    def known(ref: Any) -> str:
        if ref not in recipe.references:
            raise error(f"{ref!r} is none of the recipe's models", "source")
        return ref

    if not isinstance(entry, dict) or entry.keys() - {"source", "force"}:
        raise error(f"write source and force, got {entry!r}")
    force = entry.get("force", False)
    if not isinstance(force, bool):
        raise error(f"true or false, got {force!r}", "force")
    match entry.get("source"):
        case None:
            return Rule(None, token, None, force)
        case {"kind": "zero", **rest} if not rest:
            return Rule("zero", token, None, force)
        case {"kind": "model_token", "model": model, "token": str(name), **rest} if not rest:
            return Rule(known(as_reference(model)), name, None, force)
        case {"kind": "model_token", "model": model, "token_id": int(row), **rest} if not rest and row >= 0:
            return Rule(known(as_reference(model)), token, row, force)
        case str(model):
            return Rule(known(model), token, None, force)
        case {"model": _} | {"path": _} as model if "kind" not in model:
            return Rule(known(as_reference(model)), token, None, force)
        case other:
            raise error(f"{WAYS}; got {other!r}", "source")
