"""The tokenizer of a merged model: the template's, where that is what the recipe asks for."""

from __future__ import annotations

from typing import Any

from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.errors import MismatchError
from mergekit_lr.recipe.reading import Recipe


def check_tokenizer(recipe: Recipe, template: Checkpoint, other: Checkpoint) -> None:
    """Raise where the recipe asks for another tokenizer than the template's.

    ``base`` is the template's. ``union``, or a model's, is the same where all models have one vocabulary.

    Raises:
        UsageError: something that is not supported; with its line. MismatchError: the vocabularies differ.
    """
    doc = recipe.document
    if doc.chat_template not in (None, "base"):
        raise recipe.place.error(("chat_template",), f"{doc.chat_template!r} is not supported; leave it out, or base")
    for key in ("tokens", "pad_to_multiple_of"):
        if doc.tokenizer is not None and getattr(doc.tokenizer, key):
            raise recipe.place.error(("tokenizer", key), "is not supported; leave it out")
    source = doc.tokenizer.source if doc.tokenizer is not None else doc.tokenizer_source
    if source in (None, "base") or other is template:
        return
    if source != "union" and source not in recipe.references:
        key = "tokenizer" if doc.tokenizer is not None else "tokenizer_source"
        raise recipe.place.error((key,), f"{source!r} is none of the recipe's models; choose base, union or a model")
    mine, theirs = vocabulary(template), vocabulary(other)
    if mine is None or theirs is None:
        lacking = template if mine is None else other
        raise MismatchError(
            f"{lacking.ref}: has no tokenizer.json to compare vocabularies by; ask for tokenizer_source: base"
        )
    if mine != theirs:
        raise MismatchError(
            f"{template.ref} and {other.ref} have different vocabularies, which are not merged; with tokenizer_source: "
            "base the first one's is taken"
        )


def vocabulary(checkpoint: Checkpoint) -> dict[str, Any] | None:
    """The tokens with their numbers, from ``tokenizer.json``; None where there is none."""
    if checkpoint.folder is None or not (file := checkpoint.folder / "tokenizer.json").exists():
        return None
    content = read_config(file)
    model = content.get("model") or {}
    return {"vocabulary": model.get("vocab"), "added": content.get("added_tokens")}
