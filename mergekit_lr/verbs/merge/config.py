"""The config of a merged model: the template's, with what is no longer true of it put right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.checkpoint.shards import Header
from mergekit_lr.verbs.merge.layers import Slice
from mergekit_lr.verbs.merge.sources import LAYER_COUNTS, Source


def merged_config(
    template: Source, outputs: Mapping[str, Header], slices: Sequence[Slice], dtype: str | None
) -> dict[str, Any]:
    """The config of the result: its dtype, how many layers it has, and whether its head is still tied."""
    config = dict(template.config)
    if dtype:
        config = _everywhere(config, {"torch_dtype": dtype, "dtype": dtype})
    if any(name in outputs for name in template.aliases):
        config = _everywhere(config, {"tie_word_embeddings": False}) | {"tie_word_embeddings": False}
    chosen = [layer for part in slices for layer in range(part.given[0].first, part.given[0].end)]
    count = template.layers.count
    if chosen and chosen != list(range(count)):
        config = _stacked(config, count, chosen)
    return config


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
