"""Names of inputs as the world knows them: Hub ids stay, folders of this machine become their last names.

A result remembers its inputs by what the user typed, which may be a path with a user's name or a project's in it.
What is published says ``finetuned`` for ``/home/me/secret/finetuned``, and the Hub id of a base where it is given.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mergekit_lr.checkpoint.hub import HUB_ID
from mergekit_lr.errors import UsageError
from mergekit_lr.report.inputs import Input


@dataclass(frozen=True)
class Names:
    """local: what stands in the files, to what is published instead. ids: reference to the Hub id that it means."""

    local: dict[str, str]
    ids: dict[str, str]

    def clean(self, text: str, *, prose: bool = False) -> str:
        """``text`` with every reference to this machine under its published name.

        In ``prose``, a card's, an input goes by the last part of its path, and that gives way to a Hub id as well.
        """
        known = dict(self.local)
        if prose:
            for ref, name in self.local.items():
                if name == self.ids.get(ref):
                    known |= {f"path/to/{_last(ref)}": name, _last(ref): name}
        forms = {form: name for ref, name in known.items() for form in (ref, json.dumps(ref)[1:-1])}
        patterns = [_pattern(form) for form in sorted(forms, key=len, reverse=True)]
        # All at once: a name that was put in is not looked at again.
        return re.sub("|".join(patterns), lambda match: forms[match[0]], text, flags=re.MULTILINE)

    def with_base(self, refs: Iterable[str], name: str) -> Names:
        """The same where all of ``refs`` are called ``name``."""
        local = {ref: name for ref in refs if ref not in self.ids}
        return Names(self.local | local, self.ids | local)


def names_of(manifest: dict[str, Any], bases: Iterable[str], folder: Path, given: Iterable[str]) -> Names:
    """The names of everything that a result refers to.

    Args:
        manifest: content of lrmerge.json. bases: what the card and the adapter's config call the base. folder: of the
            result. given: ``--base-model`` values: a Hub id of the one base, or ``REF=ID``.

    Raises:
        UsageError: a given id that is none, or that could mean several bases.
    """
    bases = list(dict.fromkeys(bases))
    mapping = _given(given, bases)
    inputs = list((manifest.get("inputs") or {}).values())
    from_hub = {entry["ref"] for entry in inputs if "revision" in entry}
    from_here = {entry["ref"] for entry in inputs if "revision" not in entry}
    refs = {part for ref in (*from_hub, *from_here, *_references(manifest), *bases) for part in _parts(ref)}
    local: dict[str, str] = {}
    ids: dict[str, str] = {}
    for ref in sorted(refs | mapping.keys()):
        if ref in mapping:
            ids[ref] = local[ref] = mapping[ref]
        elif ref in from_hub or (ref not in from_here and _looks_like_id(ref)):
            ids[ref] = ref.partition("@")[0]
        elif (found := Input.of("", ref, Path(ref)) if Path(ref).exists() else None) and found.hub:
            ids[ref] = local[ref] = found.hub  # a path into the Hub's cache
        else:
            local[ref] = _last_name(ref, local.values())
    if out := manifest.get("out"):
        local[str(out)] = folder.name
    local.setdefault(str(folder), folder.name)
    return Names(local, ids)


def _references(manifest: dict[str, Any]) -> Iterator[str]:
    """Every reference to an input in a manifest, whatever verb wrote it."""
    options = manifest.get("options") or {}
    single = [manifest.get(key) for key in ("base", "finetuned", "source")] + [options.get("base")]
    entries = manifest.get("adapters") or []
    several = [*(manifest.get("models") or []), *(manifest.get("loras") or {}), *_in_recipe(manifest.get("recipe"))]
    refs = [*single, *several, *(entry.get("ref") for entry in entries if isinstance(entry, dict))]
    yield from (ref for ref in refs if isinstance(ref, str) and ref)


def _in_recipe(value: Any, key: str = "") -> Iterator[str]:
    if isinstance(value, dict):
        for name, entry in value.items():
            yield from _in_recipe(entry, name)
    elif isinstance(value, list):
        for entry in value:
            yield from _in_recipe(entry, key)
    elif isinstance(value, str) and (key in ("model", "base_model", "adapter") or (key == "source" and "/" in value)):
        yield value


def _parts(ref: str) -> list[str]:
    """``BASE+ADAPTER:0.5`` as its references."""
    return [re.sub(r":-?[\d.]+$", "", part) for part in ref.split("+") if part] or [ref]


def _looks_like_id(ref: str) -> bool:
    # Of a reference without a revision in the manifest only its form is known, and what lies here under that name.
    return HUB_ID.fullmatch(ref) is not None and not ref.startswith((".", "~")) and not Path(ref).exists()


def _given(given: Iterable[str], bases: list[str]) -> dict[str, str]:
    mapping = {}
    for item in given:
        ref, _, name = item.rpartition("=")
        if not re.fullmatch(r"[\w.-]+/[\w.-]+", name) or ref.startswith("="):
            raise UsageError(f"--base-model {item}: write a Hub id, org/name, or REF=org/name where there are several")
        if not ref and len(bases) != 1:
            which = ", ".join(bases) or "none"
            raise UsageError(f"--base-model {item}: of which base? the result names {which}; write REF={name}")
        ref = next((base for base in bases if ref and ref in (base, _last(base))), ref)
        if ref and ref not in bases:
            raise UsageError(f"--base-model {item}: the result names no base {ref}, it names {', '.join(bases)}")
        mapping[ref or bases[0]] = name
    return mapping


def _last(ref: str) -> str:
    return Path(ref.replace("\\", "/")).name or "input"


def _last_name(ref: str, taken: Iterable[str]) -> str:
    """The last name of a path; with the folder above it where two would be the same."""
    name, above = _last(ref), Path(ref.replace("\\", "/")).parent.name
    return f"{above}-{name}" if name in set(taken) and above else name


def _pattern(ref: str) -> str:
    """Where ``ref`` stands as a whole: a path anywhere, a bare word only where it is quoted or a value alone."""
    whole = re.escape(ref)
    if "/" in ref or "\\" in ref:
        return rf"(?<![\w./~-]){whole}(?![\w-]|\.\w)"
    return rf"""(?<=["'`]){whole}(?=["'`](?!\s*:))|(?:(?<=: )|(?<=- )){whole}$"""
