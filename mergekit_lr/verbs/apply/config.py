"""The config of a result: the base's, with what is no longer true of it put right."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.layout import parameters
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.shards import Header
from mergekit_lr.errors import MismatchError
from mergekit_lr.verbs.apply.rows import is_scaled
from mergekit_lr.verbs.apply.targets import Targets, alike

HEADS = ("lm_head.weight", "embed_out.weight")


def config_of(base: Checkpoint, found: Targets, dtype: str | None) -> dict[str, Any]:
    """The config of ``base`` after ``found``, stored in ``dtype`` where one was asked for."""
    config = dict(base.config)
    if found.untied or _parted(base, found):
        config = _with(config, "tie_word_embeddings", False, always=True)
    if dtype:
        config = _with(_with(config, "torch_dtype", dtype), "dtype", dtype)
    if any(is_scaled(base, name) for name in base.tensors):
        config.pop("quantization_config", None)
    if grown := resized(base, found):
        config = _vocabulary(config, *grown)
    return config


def resized(base: Checkpoint, found: Targets) -> tuple[int, int] | None:
    """Rows of the token table before and after, where an adapter brings one of another size."""
    for target in found.changing:
        name = target.parameter.blocks[0][0].tensor
        if target.fresh and name in base.tensors and target.parameter.kind in (Kind.EMBEDDING, Kind.LINEAR):
            return base.tensors[name].shape[0], target.parameter.shape[0]
    return None


def refuse_tied(untied: Sequence[str], outputs: Mapping[str, Header], config: dict[str, Any]) -> None:
    """Raise where the model's own code would not take a separate tensor for what was untied.

    Raises:
        MismatchError: naming the parameter.
    """
    if not untied:
        return
    separate = {parameter.name for parameter in parameters(outputs, config).parameters}
    if kept := [name for name in untied if name not in separate]:
        raise MismatchError(
            f"{kept[0]} shares its tensor with a table that the adapter changes alone, and this model cannot have the "
            "two apart; give the adapter the same change at both ends"
        )


def _parted(base: Checkpoint, found: Targets) -> bool:
    """Whether a table and a head that are both on disk, although the config ties them, no longer change alike."""
    if not base.config.get("tie_word_embeddings") or not any(name.endswith(HEADS) for name in base.tensors):
        return False
    heads = [target for target in found.changing if target.name.endswith(HEADS)]
    tables = [target for target in found.changing if target.parameter.kind is Kind.EMBEDDING]
    if len(heads) == len(tables) == 1:
        head, table = heads[0], tables[0]
        return not alike(head.parameter, head.changes, table.parameter, table.changes)
    return bool(heads or tables)


def _with(config: dict[str, Any], key: str, value: Any, *, always: bool = False) -> dict[str, Any]:
    """``config`` with ``key`` set wherever it stands, also in the configs inside it, and at the top ``always``."""
    inner = {k: _with(v, key, value) if isinstance(v, dict) else v for k, v in config.items()}
    return inner | ({key: value} if always or key in config else {})


def _vocabulary(config: dict[str, Any], before: int, after: int) -> dict[str, Any]:
    """``config`` with a vocabulary of ``before`` tokens, wherever it says so, made ``after``."""
    inner = {k: _vocabulary(v, before, after) if isinstance(v, dict) else v for k, v in config.items()}
    return inner | ({"vocab_size": after} if config.get("vocab_size") == before else {})
