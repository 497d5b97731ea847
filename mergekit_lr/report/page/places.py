"""Where in a model a tensor stands: its layer, and its kind of module.

``model.layers.3.mlp.up_proj.weight`` is layer 3, kind ``mlp.up_proj``. Numbers inside a kind, as of experts, are
folded into ``*``, so that a map has a row for each kind and not for each expert.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import NamedTuple

OUTSIDE = "-"  # the layer of what is in none: embeddings, heads


class Place(NamedTuple):
    """A layer's number, or ``OUTSIDE``, and a kind."""

    layer: str
    kind: str


def places_of(names: Sequence[str]) -> list[Place]:
    """The place of each tensor; where several stacks count layers, as an encoder and a decoder, kinds name theirs."""
    parts = [re.fullmatch(r"(?:(.*?)\.)?(\d+)\.(.+)", name.removesuffix(".weight")) for name in names]
    several = len({part[1] for part in parts if part}) > 1
    found = []
    for name, part in zip(names, parts, strict=True):
        if part is None:
            found.append(Place(OUTSIDE, name.removesuffix(".weight")))
            continue
        kind = re.sub(r"(?<![^.])\d+(?![^.])", "*", part[3])
        found.append(Place(str(int(part[2])), f"{part[1]}: {kind}" if several and part[1] else kind))
    return found


def layers_of(places: Iterable[Place]) -> list[str]:
    """Layers in order, what is outside of them last."""
    return sorted({place.layer for place in places}, key=lambda text: (text == OUTSIDE, text != OUTSIDE and int(text)))


def kinds_of(places: Iterable[Place]) -> list[str]:
    """Kinds, in the order in which they come."""
    return list(dict.fromkeys(place.kind for place in places))


def short(kinds: Sequence[str]) -> dict[str, str]:
    """Each kind by as few of its last parts as tell it from all others."""
    parts = {kind: re.split(r"(?<=[.:])\s*", kind) for kind in kinds}
    ends: dict[str, str] = {}
    for kind, own in parts.items():
        for count in range(1, len(own) + 1):
            end = own[-count:]
            if not any(other[-count:] == end for name, other in parts.items() if name != kind):
                break
        ends[kind] = kind if count == len(own) else "".join(end)
    return ends
