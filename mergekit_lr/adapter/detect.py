"""Which dialect a file of tensors is in, from its keys alone."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from mergekit_lr.adapter import comfy, diffusers, kohya
from mergekit_lr.errors import FormatError

_LYCORIS = re.compile(r"\.(hada_\w+|lokr_\w+|lora_mid\.weight|diff|diff_b|w_norm|b_norm|dora_scale)$")
_BARE = re.compile(r"(down_blocks|up_blocks|mid_block|conv_in|conv_out|time_embedding)\.")


def detect(keys: Iterable[str], config: Mapping[str, Any] | None = None) -> str:
    """The dialect: "peft", "kohya", "lycoris", "diffusers" or "comfy".

    Args:
        keys: Names of the file's tensors.
        config: Content of an ``adapter_config.json`` beside it, if there is one: then it is PEFT's.

    Raises:
        FormatError: no keys, keys of no known dialect, or of several.
    """
    found: dict[str, str] = {}
    lycoris = False
    for key in keys:
        found.setdefault(_dialect(key, config), key)
        lycoris = lycoris or bool(_LYCORIS.search(key))
    if not found:
        raise FormatError("the file holds no tensors, so no adapter")
    if "" in found:
        raise FormatError(f"tensor {found['']} is in no known adapter dialect: peft, kohya, lycoris, diffusers, comfy")
    if len(found) > 1:
        examples = ", ".join(f"{key} ({dialect})" for dialect, key in sorted(found.items()))
        raise FormatError(f"the file mixes dialects, so no tool can have written it whole: {examples}")
    dialect = next(iter(found))
    return "lycoris" if dialect == "kohya" and lycoris else dialect


def _dialect(key: str, config: Mapping[str, Any] | None) -> str:
    first = key.partition(".")[0]
    if (config and config.get("peft_type")) or key.startswith("base_model."):
        return "peft"
    if kohya.PREFIX.fullmatch(first):
        return "kohya"
    if first in comfy.COMPONENTS:
        return "comfy"
    if first in diffusers.COMPONENTS or _BARE.match(key):
        return "diffusers"
    # transformers' load_adapter writes PEFT's words without PEFT's prefix.
    return "peft" if re.search(r"\.lora_(embedding_)?[AB](\.|$)", key) else ""
