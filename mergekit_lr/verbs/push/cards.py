"""The card on its way to the Hub: metadata that is valid there, notices on its bases, the user's own text kept."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import yaml

from mergekit_lr.errors import FormatError
from mergekit_lr.report.card import combined

RELATIONS = ("adapter", "merge", "quantized", "finetune")
# The part of a card that a run of lrmerge writes anew; what stands outside is the user's.
GENERATED = re.compile(r"<!-- lrmerge:begin.*?<!-- lrmerge:end -->", re.DOTALL)
FRONT = re.compile(r"\A\ufeff?---\r?\n.*?\n---[ \t]*(?:\r?\n|\Z)", re.DOTALL)


def metadata_of(card: str, file: Path) -> dict[str, Any]:
    """The metadata of a card.

    Raises:
        FormatError: there is none, or it is not what the Hub reads.
    """
    from huggingface_hub import ModelCard

    try:
        data = ModelCard(card).data.to_dict()
    except (ValueError, TypeError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())[:160]
        raise FormatError(f"{file}: its metadata is not valid ({reason}); mend what stands between ---") from None
    if not data:
        raise FormatError(f"{file}: has no metadata; begin it with ---, base_model: org/name, ---")
    relation = data.get("base_model_relation")
    if relation is not None and relation not in RELATIONS:
        raise FormatError(f"{file}: base_model_relation is {relation!r}, the Hub knows {', '.join(RELATIONS)}")
    return data


def with_bases(card: str, ids: list[str], relation: str) -> str:
    """The card with these Hub ids as its bases; the rest of it stays as it is."""
    from huggingface_hub import ModelCard

    parsed = ModelCard(card)
    wanted = ids if len(ids) > 1 else ids[0]
    if parsed.data.get("base_model") in (wanted, ids):
        return card
    parsed.data["base_model"] = wanted
    parsed.data["base_model_relation"] = parsed.data.get("base_model_relation") or relation
    return str(parsed)


def with_notice(card: str, sentences: Iterable[str]) -> str:
    """The card with what a reader must know of its bases, ahead of its first section."""
    notice = "".join(f"> {sentence}\n\n" for sentence in sentences if sentence not in card)
    generated = GENERATED.search(card)
    start = generated.start() if generated else 0
    section = re.search(r"^## ", card[start:], re.MULTILINE)
    if section is None:
        return f"{card.rstrip()}\n\n{notice}" if notice else card
    at = start + section.start()
    return card[:at] + notice + card[at:]


def with_text_of(card: str, there: str) -> tuple[str, bool]:
    """The card with what stands in the one on the Hub and is the user's; whether both had text that the other lacks.

    A card that no run of lrmerge wrote is the user's as a whole, and replaces the other.
    """
    if GENERATED.search(card) is None:
        return card, False
    result = combined(card, there)
    missing = [paragraph for paragraph in _own(card) if paragraph not in result]
    if missing:
        result = f"{result.rstrip()}\n\n" + "\n\n".join(missing) + "\n"
    return result, bool(missing) and any(paragraph not in card for paragraph in _own(there))


def _own(card: str) -> list[str]:
    """Paragraphs that no run wrote."""
    text = GENERATED.sub("", FRONT.sub("", card))
    return [paragraph.strip() for paragraph in re.split(r"\n\s*\n", text) if paragraph.strip()]
