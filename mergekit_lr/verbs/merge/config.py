"""The config of a merged model: the template's, with what is no longer true of it put right.

Numbers of tokens (``eos_token_id`` ...) are looked up in the old vocabulary and written as the new one has them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.checkpoint.shards import Header
from mergekit_lr.verbs.merge.layers import Slice
from mergekit_lr.verbs.merge.sources import LAYER_COUNTS, Source
from mergekit_lr.verbs.merge.vocabulary import Vocabulary


def merged_config(
    template: Source,
    outputs: Mapping[str, Header],
    slices: Sequence[Slice],
    dtype: str | None,
    vocabulary: Vocabulary | None = None,
) -> dict[str, Any]:
    """The config of the result: its dtype, layers and vocabulary, and whether its head is still tied."""
    config = dict(template.config)
    if dtype:
        config = _everywhere(config, {"torch_dtype": dtype, "dtype": dtype})
    if any(name in outputs for name in template.aliases):
        config = _everywhere(config, {"tie_word_embeddings": False}) | {"tie_word_embeddings": False}
    chosen = [layer for part in slices for layer in range(part.given[0].first, part.given[0].end)]
    count = template.layers.count
    if chosen and chosen != list(range(count)):
        config = _stacked(config, count, chosen)
    if vocabulary is not None and template.token_rows:
        config = _replaced(config, "vocab_size", template.token_rows, vocabulary.rows)
    return config if vocabulary is None else renumbered(config, vocabulary)[0]


def renumbered(config: dict[str, Any], vocabulary: Vocabulary) -> tuple[dict[str, Any], list[str]]:
    """``config``, or a generation config, with the new numbers of its tokens; and the keys whose token is gone.

    In place of a token that is gone comes the new tokenizer's own for the same purpose, or null.
    """
    if vocabulary.chosen.ids.items() >= vocabulary.old.items():
        return config, []
    names = {number: token for token, number in vocabulary.old.items()}
    gone: list[str] = []

    def number(key: str, old: int) -> int | None:
        new = vocabulary.chosen.ids.get(names.get(old, ""))
        if new is None:
            gone.append(key)
        return vocabulary.chosen.special.get(key) if new is None else new

    def value(key: str, old: Any) -> Any:
        if isinstance(old, dict):
            return {inner: value(inner, entry) for inner, entry in old.items()}
        if not key.endswith(("token_id", "token_index")) or isinstance(old, bool):
            return old
        if isinstance(old, list):
            found = [number(key, entry) for entry in old if isinstance(entry, int)]
            return list(dict.fromkeys(entry for entry in found if entry is not None)) or None
        return number(key, old) if isinstance(old, int) else old

    return value("", config), gone


def _replaced(config: dict[str, Any], key: str, old: int, new: int) -> dict[str, Any]:
    """``config`` with ``new`` for ``old`` wherever ``key`` stands, also in the configs inside it."""
    inner = {k: _replaced(v, key, old, new) if isinstance(v, dict) else v for k, v in config.items()}
    return inner | ({key: new} if inner.get(key) == old else {})


def _everywhere(config: dict[str, Any], values: Mapping[str, Any]) -> dict[str, Any]:
    """``config`` with ``values`` wherever their keys stand, also in the configs inside it."""
    inner = {k: _everywhere(v, values) if isinstance(v, dict) else v for k, v in config.items()}
    return inner | {key: value for key, value in values.items() if key in config}


def _stacked(config: dict[str, Any], count: int, chosen: Sequence[int]) -> dict[str, Any]:
    """``config`` for the layers ``chosen`` of ``count``: their number, and lists with an entry for each."""

    def entry(key: str, value: Any) -> Any:
        if isinstance(value, dict):
            return _stacked(value, count, chosen)
        if key in LAYER_COUNTS and value == count:
            return len(chosen)
        if isinstance(value, list) and len(value) == count and "layer" in key:
            return [value[min(layer, count - 1)] for layer in chosen]
        return value

    return {key: entry(key, value) for key, value in config.items()}
