"""The licence of a result, from those that its inputs state.

This sorts licences by what they ask of whoever passes on what was made from a work; it is no legal advice. Free and
permissive ones give way to a stricter one. Where two different ones both set terms for what is made, neither stands
for the other: the result names both, as ``other``, and a warning says so. Nothing is invented for an input that
states none. Identifiers are the Hub's (https://huggingface.co/docs/hub/repositories-licenses).
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Any, NamedTuple

from mergekit_lr.report.markdown import listed


class Strictness(IntEnum):
    """What a licence asks, the least first. From ``SHARED_ALIKE`` on its terms go on to what is made from a work."""

    FREE = 0
    PERMISSIVE = 1
    SHARED_ALIKE = 2
    OWN_TERMS = 3
    NON_COMMERCIAL = 4
    NO_DERIVATIVES = 5


_FREE = ("cc0-1.0", "unlicense", "wtfpl", "pddl")
# Those that ask for more come later.
_PERMISSIVE = (
    "zlib", "isc", "mit", "postgresql", "ncsa", "bsl-1.0", "bsd", "bsd-2-clause", "bsd-3-clause", "bsd-3-clause-clear",
    "ecl-2.0", "afl-3.0", "artistic-2.0", "apache-2.0", "c-uda", "cdla-permissive-1.0", "cdla-permissive-2.0",
    "etalab-2.0", "odc-by", "cc-by-2.0", "cc-by-2.5", "cc-by-3.0", "cc-by-4.0",
)  # fmt: skip
_ALIKE = re.compile(
    r"(a|l)?gpl(-.*)?|gfdl|mpl-.*|epl-.*|eupl-.*|osl-.*|odbl|ms-pl|lppl-.*|ofl-.*|cdla-sharing-.*|cc-by-sa-.*"
)
_NON_COMMERCIAL = re.compile(r"\bnc\b|non-?commercial|\bmnpl\b|deepfloyd|research", re.IGNORECASE)
_NO_DERIVATIVES = re.compile(r"\bnd\b|no-?derivatives", re.IGNORECASE)
JOIN = "-and-"  # between the names of licences that hold together
_UNSTATED = ("", "unknown", "none", "null", "~")


class Licence(NamedTuple):
    """A licence as a card states it: the Hub's identifier, and for ``other`` a name and a link."""

    id: str
    name: str | None = None
    link: str | None = None

    @property
    def label(self) -> str:
        """What people call it."""
        return self.name if self.id == "other" and self.name else self.id

    @property
    def strictness(self) -> Strictness:
        """What it asks; one that is not known here is taken to have terms of its own."""
        words = self.label.lower().replace("_", "-")
        if _NO_DERIVATIVES.search(words):
            return Strictness.NO_DERIVATIVES
        if _NON_COMMERCIAL.search(words):
            return Strictness.NON_COMMERCIAL
        if self.id in _FREE or self.id in _PERMISSIVE:
            return Strictness.FREE if self.id in _FREE else Strictness.PERMISSIVE
        return Strictness.SHARED_ALIKE if _ALIKE.fullmatch(self.id) else Strictness.OWN_TERMS


class Combined(NamedTuple):
    """licence: of the result, None where no input states one. stated: input to what it states. unstated: the other
    inputs. warnings: what whoever passes the result on must look at."""

    licence: Licence | None
    stated: dict[str, str]
    unstated: tuple[str, ...]
    warnings: tuple[str, ...]


def licences_of(card: Mapping[str, Any]) -> tuple[Licence, ...]:
    """The licences that a card's metadata states; none where it says nothing, or ``unknown``."""
    value = card.get("license")
    ids = [entry.strip() for entry in (value if isinstance(value, list) else [value]) if isinstance(entry, str)]
    name, link = (card[key] if isinstance(card.get(key), str) else None for key in ("license_name", "license_link"))
    found = [one.lower() for one in ids if one.lower() not in _UNSTATED]
    if found == ["other"] and name and JOIN in name:  # of a result that was made from several
        return tuple(Licence(one) for one in name.split(JOIN) if one)
    return tuple(Licence(one, name, link) if one == "other" else Licence(one) for one in found)


def named(text: str) -> dict[str, str]:
    """The metadata that says what ``text`` does, a licence as a file's metadata names it."""
    words = text.strip()
    known = words.lower()
    if known in (*_FREE, *_PERMISSIVE) or _ALIKE.fullmatch(known):
        return {"license": known}
    return {"license": "other", "license_name": words[:80]} if words else {}


def combine(cards: Sequence[tuple[str, Mapping[str, Any]]]) -> Combined:
    """The licence of what is made from several inputs.

    Args:
        cards: name and card metadata of every input.
    """
    found = [(name, licences_of(card)) for name, card in cards]
    stated = {name: " and ".join(one.label for one in held) for name, held in found if held}
    unstated = tuple(name for name, held in found if not held)
    every = list({one.label: one for _, held in found for one in held}.values())
    if not every:
        return Combined(None, stated, unstated, ())
    binding = sorted((one for one in every if one.strictness >= Strictness.SHARED_ALIKE), key=lambda one: one.label)
    if not binding:
        order = (*_FREE, *_PERMISSIVE)
        return Combined(max(every, key=lambda one: order.index(one.id)), stated, unstated, ())
    chosen = binding[0] if len(binding) == 1 else Licence("other", JOIN.join(one.label for one in binding))
    return Combined(chosen, stated, unstated, tuple(_warnings(every, binding)))


def _warnings(every: Sequence[Licence], binding: Sequence[Licence]) -> list[str]:
    labels = [one.label for one in binding]
    warnings = []
    if len(binding) > 1:
        both = "both" if len(binding) == 2 else "all"
        warnings.append(
            f"{listed(labels)} {both} set terms for what is made from them: see whether they "
            "can be kept together before you pass this on"
        )
    for one in binding:
        looser = sorted({other.label for other in every if other.strictness < one.strictness})
        if one.strictness is Strictness.NO_DERIVATIVES:
            warnings.append(f"{one.label} does not allow to pass on what is made from its work, as this is")
        if one.strictness is Strictness.NON_COMMERCIAL and looser:
            warnings.append(f"{one.label} allows no commercial use of any of it, though {listed(looser)} would")
    return warnings
