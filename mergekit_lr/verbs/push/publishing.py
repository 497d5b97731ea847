"""From the files of a result to what is published: inputs under public names, a base that is known there, no leak."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from mergekit_lr.errors import FormatError
from mergekit_lr.report.loading import addressed
from mergekit_lr.report.manifest import FILE
from mergekit_lr.verbs.push.cards import metadata_of, with_bases
from mergekit_lr.verbs.push.contents import Contents
from mergekit_lr.verbs.push.leaks import leaks
from mergekit_lr.verbs.push.names import Names, names_of

CARD = "README.md"
CONFIG = "adapter_config.json"


@dataclass(frozen=True)
class Published:
    """contents: with the texts that are sent. bases: Hub ids of the bases. notes: what the owner should know."""

    contents: Contents
    bases: tuple[str, ...]
    notes: tuple[str, ...]


def prepared(contents: Contents, repo: str, base_model: Iterable[str]) -> Published:
    """``contents`` as they are published in ``repo``.

    Args:
        base_model: Hub ids for bases that lie on this machine, see ``names_of``.

    Raises:
        FormatError: a card without valid metadata or without a base that the Hub knows.
        UsageError: an id in ``base_model`` that fits no base.
    """
    base_model = list(base_model)
    bases = _bases(contents) or [name for name in base_model if "=" not in name]
    names = names_of(contents.manifest, bases, contents.folder, base_model)
    ids = [names.ids[ref] for ref in bases if ref in names.ids]
    ids = list(dict.fromkeys(ids[:1] if contents.kind == "adapter" else ids))
    if contents.manifest and not ids:
        what = f"the base {bases[0]} is no model of the Hub" if bases else "no base is named"
        raise FormatError(f"{contents.folder}: {what}; say which one it is there with --base-model org/name")
    if contents.kind == "adapter" and ids:  # one base, in the card as in the configuration that PEFT reads
        names = names.with_base(bases, ids[0])
    texts = {part.name: part.text for part in contents.parts if part.text is not None and not part.is_vocabulary}
    cleaned = {name: names.clean(text, prose=name == CARD) for name, text in texts.items()}
    if contents.kind == "adapter" and ids:
        cleaned |= _with_base(cleaned.get(CONFIG), ids[0])
    notes = _renamed(texts, cleaned, names, contents.folder)
    if CARD in cleaned:
        card = addressed(cleaned[CARD], repo)
        cleaned[CARD] = with_bases(card, ids, "adapter" if contents.kind == "adapter" else "merge") if ids else card
        notes += _on_metadata(cleaned[CARD], contents)
    elif contents.text_of(FILE) is not None:
        raise FormatError(f"{contents.folder / CARD}: the model card is missing; write the result again")
    else:
        notes.append(f"no {CARD}: the repository will have no card that says what this is")
    if contents.kind == "model" and not contents.config:
        notes.append("no config.json: transformers cannot load the model from the Hub")
    return Published(contents.with_texts(cleaned), tuple(ids), tuple(notes))


def refuse_leaks(contents: Contents, token: str | None) -> list[str]:
    """Notes on paths in the weights' own metadata, which the tool that trained them wrote; all else stops here.

    Raises:
        FormatError: a secret, or an absolute path in a text, in what would be sent; with file and line.
    """
    own = (Path.home(), contents.folder, contents.folder.parent)
    for part in contents.parts:
        for leak in leaks(part.text or "", token=token, own=own, paths=not part.is_vocabulary):
            remedy = "take it out, and revoke it" if leak.secret else "write a name that others know in its place"
            raise FormatError(
                f"{part.path} line {leak.line}: holds {leak.what}, which is not to be published; {remedy}"
            )
    notes = []
    for file, metadata in contents.metadata.items():
        for key, value in metadata.items():
            found = sorted(leaks(value, token=token, own=own), key=lambda leak: not leak.secret)
            if found and found[0].secret:
                raise FormatError(f"{contents.folder / file}: its metadata {key} holds {found[0].what}; take it out")
            notes += [f"{file}: its metadata {key} holds {leak.what}" for leak in found[:1]]
    return notes


def loading(contents: Contents, repo: str) -> str:
    """How to load the published result: the card's own first example, or the shortest one that is right."""
    example = re.search(r"```python\n(.*?)```", contents.text_of(CARD) or "", re.DOTALL)
    if example and repo in example[1]:
        return example[1].strip()
    if contents.kind == "adapter" and contents.config:
        base = json.loads(contents.text_of(CONFIG) or "{}").get("base_model_name_or_path") or "BASE"
        return (
            "from peft import PeftModel\nfrom transformers import AutoModelForCausalLM\n\n"
            f'model = AutoModelForCausalLM.from_pretrained("{base}")\n'
            f'model = PeftModel.from_pretrained(model, "{repo}")'
        )
    if contents.kind == "model" and contents.config:
        name = (contents.config.get("architectures") or ["AutoModel"])[0]
        return f'from transformers import {name}\n\nmodel = {name}.from_pretrained("{repo}")'
    return f'from huggingface_hub import snapshot_download\n\nfolder = snapshot_download("{repo}")'


def _bases(contents: Contents) -> list[str]:
    """What the card's metadata, an adapter's configuration or else the manifest calls the bases, in this order."""
    card, manifest = contents.text_of(CARD), contents.manifest
    named = metadata_of(card, contents.folder / CARD).get("base_model") if card is not None else None
    bases = [named] if isinstance(named, str) else list(named or ())
    if contents.kind == "adapter":
        bases += [contents.config.get("base_model_name_or_path"), manifest.get("base")]
    elif not bases:
        bases += [manifest.get("base"), *(manifest.get("models") or ())]
    return list(dict.fromkeys(str(base) for base in bases if base))


def _with_base(config: str | None, name: str) -> dict[str, str]:
    """The configuration of an adapter that names no base, with one: PEFT and servers find the base by it."""
    if config is None:
        return {}
    return {CONFIG: re.sub(r'("base_model_name_or_path":\s*)(?:null|"")', rf'\g<1>"{name}"', config)}


def _renamed(texts: dict[str, str], cleaned: dict[str, str], names: Names, folder: Path) -> list[str]:
    changed = [name for name in cleaned if cleaned[name] != texts[name]]
    said = [f"{ref} is {name}" for ref, name in names.local.items() if name not in (ref, folder.name)]
    if not changed or not said:
        return []
    return [f"{', '.join(changed)}: sent with other names for what lies on this machine ({', '.join(said)})"]


def _on_metadata(card: str, contents: Contents) -> list[str]:
    metadata = metadata_of(card, contents.folder / CARD)
    if metadata.get("license"):
        return []
    return [f"{CARD}: names no licence; write 'license: apache-2.0', or what holds, between the --- at its top"]
