"""Which model an adapter's names belong to, as dialects differ in it.

A PEFT folder is of one model, and its names begin inside it: ``down_blocks.0...``. Files of image tools are of a
pipeline: ``unet.down_blocks.0...`` beside ``text_encoder.text_model...``. Going from one to the other puts the
component in front, or picks one and takes it away.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import NamedTuple

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.errors import UsageError

# The first word of a module's path in an image model or its text encoder, to the component it belongs to.
_FIRST = {
    **dict.fromkeys(("down_blocks", "up_blocks", "mid_block", "conv_in", "conv_out", "time_embedding"), "unet"),
    "add_embedding": "unet",
    "transformer_blocks": "transformer",
    "single_transformer_blocks": "transformer",
    "double_blocks": "diffusion_model",
    "single_blocks": "diffusion_model",
    "input_blocks": "diffusion_model",
    "text_model": "text_encoder",
}

COMPONENTS = frozenset(_FIRST.values()) | {"text_encoder_2", "text_encoder_3", "text_encoders", "transformer_2"}


class Renamed(NamedTuple):
    """The adapter under its new names, and the names that belong to other components and are left out."""

    adapter: Adapter
    left_out: tuple[str, ...]


def named_for(adapter: Adapter, dialect: str, to: str, component: str | None = None) -> Renamed:
    """The adapter under the names that dialect ``to`` has, coming from ``dialect``.

    Args:
        adapter: what to rename. component: which part of a pipeline the names are of (to a file), or which part to
            take (to a PEFT folder).

    Raises:
        UsageError: the component cannot be told, is not there, or there are several.
    """
    if (dialect == "peft") == (to == "peft"):
        return Renamed(adapter, ())
    names = [*adapter.weights, *adapter.saved, *adapter.token_rows, *adapter.added]
    if to != "peft":
        prefix = component or _component(names, to)
        return Renamed(_mapped(adapter, lambda name: f"{prefix}.{name}"), ())
    found = sorted({name.partition(".")[0] for name in names})
    chosen = component or found[0]
    if component is None and len(found) > 1:
        raise UsageError(f"a PEFT folder is of one model, this adapter has {', '.join(found)}; choose with --component")
    if chosen not in found:
        raise UsageError(f"--component {chosen}: this adapter has {', '.join(found)}")
    left_out = tuple(name for name in names if not name.startswith(f"{chosen}."))
    adapter = replace(adapter, config={})  # of the file's own kind, nothing that PEFT knows
    return Renamed(_mapped(adapter, lambda n: None if n in left_out else n.removeprefix(f"{chosen}.")), left_out)


def _component(names: list[str], to: str) -> str:
    for name in names:
        component = _FIRST.get(name.partition(".")[0])
        if component:
            return component
    raise UsageError(
        f"{names[0]}: is in no known part of an image model, and {to} files hold image models only; name the part "
        "with --component (unet, transformer, text_encoder ...)"
    )


def _mapped(adapter: Adapter, rename: Callable[[str], str | None]) -> Adapter:
    """Every name through ``rename``; None leaves it out."""

    def keys(table: dict) -> dict:
        return {new: value for name, value in table.items() if (new := rename(name)) is not None}

    return replace(
        adapter,
        weights=keys(adapter.weights),
        saved=keys(adapter.saved),
        token_rows=keys(adapter.token_rows),
        added=keys(adapter.added),
    )
