"""What a card says of the inputs of a result: their names without paths of this disk, and what their own cards state.

A name is the Hub's id where the input came from the Hub or its cache, and otherwise the last part of its path.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import yaml

from mergekit_lr.report import licence
from mergekit_lr.report.manifest import FILE

CARD = "README.md"
FRONT = re.compile(r"\A\ufeff?\s*---[ \t]*\r?\n(.*?)(?:\r?\n|\A)---[ \t]*(?:\r?\n|\Z)", re.DOTALL)
LARGEST = 1 << 20  # bytes of a card that are looked at
_REPOSITORY = re.compile(r"models--(.+)")
_FILE = re.compile(r"[\w.-]+")
_ASKED = re.compile(r"@([\w./-]+)$")
_WORD = re.compile(r"[\w][\w./@-]{0,119}")
# Files that stand for the folder they lie in, so that the card there is theirs.
_OWN_STEMS = ("model", "adapter_model", "diffusion_pytorch_model", "pytorch_model", "pytorch_lora_weights")


@dataclass(frozen=True)
class Input:
    """One input.

    role: base, fine-tune, model or adapter. ref: what the user called it. name: what a card calls it. hub: its id on
    the Hub, with ``subfolder`` and ``revision`` there. card: metadata of its README. config: its config.json. note:
    why its card could not be read. ours: whether a run of lrmerge made it.
    """

    role: str
    ref: str
    name: str
    hub: str | None = None
    revision: str | None = None
    subfolder: str = ""
    card: Mapping[str, Any] = field(default_factory=dict)
    config: Mapping[str, Any] = field(default_factory=dict)
    note: str | None = None
    ours: bool = False

    @classmethod
    def of(
        cls,
        role: str,
        ref: str,
        place: Path | None,
        *,
        config: Mapping[str, Any] | None = None,
        metadata: Mapping[str, str] | None = None,
    ) -> Input:
        """The input that was read from ``place``, a folder or a file; None for one in memory.

        Args:
            metadata: string metadata of its file, which may name a licence (``modelspec.license``).
        """
        if place is None:
            return cls(role, ref, "tensors in memory", config=config or {})
        hub, revision, subfolder = _on_hub(place)
        folder = place if place.is_dir() else place.parent if place.name.startswith(_OWN_STEMS) else None
        card, note = _card_of(folder) if folder is not None else ({}, None)
        card = licence.named((metadata or {}).get("modelspec.license", "")) | card
        link = card.get("license_link")
        if hub and isinstance(link, str) and _FILE.fullmatch(link):
            card["license_link"] = f"https://huggingface.co/{hub}/blob/{revision}/{link}"
        name = "/".join(part for part in (hub, subfolder) if part) or place.resolve().name
        ours = folder is not None and (folder / FILE).is_file()
        return cls(role, ref, name, hub, revision, subfolder, card, config or {}, note, ours)

    @property
    def asked(self) -> str | None:
        """The revision on the Hub that the user asked for."""
        match = _ASKED.search(self.ref)
        return match[1] if match and self.hub else None

    @property
    def address(self) -> str:
        """What a command calls it."""
        if self.hub and not self.subfolder:
            return f"{self.hub}@{self.asked}" if self.asked else self.hub
        return self.role.upper() if self.ref == "memory" else self.name

    @property
    def ids(self) -> list[str]:
        """The Hub ids that stand for it: its own, or, where a run of lrmerge made it here, those it was made from."""
        if self.hub:
            return [self.hub]
        made_from = self.card.get("base_model") if self.ours else None
        found = made_from if isinstance(made_from, list) else [made_from]
        return [repo for one in found if (repo := stated_hub_id(one))]

    @property
    def gated(self) -> bool:
        """Whether its card says that its terms are to be accepted first."""
        return any(key.startswith("extra_gated") for key in self.card)


def stated_hub_id(*texts: object) -> str | None:
    """The Hub id that the first of ``texts``, of configurations and cards, surely is.

    A single word may as well be a folder of somebody's disk, and is none; a path into the Hub's cache is one.
    """
    return next((repo for text in texts if isinstance(text, str) and (repo := _hub_id(text))), None)


def _hub_id(text: str) -> str | None:
    from huggingface_hub.utils import HFValidationError, validate_repo_id

    repo = _on_hub(Path(text))[0] or text.partition("@")[0]
    if repo.count("/") != 1 or _exists(repo):
        return None
    try:
        validate_repo_id(repo)
    except HFValidationError:
        return None
    return repo


def portable(text: str, inputs: Sequence[Input]) -> str:
    """``text`` with the inputs under the names that a card gives them, and any other path as its last part."""
    named = {one.ref: one.address for one in inputs}
    if text in named:
        return named[text]
    parts = text.split("+")  # MODEL+LORA
    if len(parts) > 1 and not _exists(text):
        return "+".join(portable(part, inputs) for part in parts)
    here = PurePosixPath(text).is_absolute() or text.startswith(("./", "../", "~"))
    if "\n" in text or not (here or PureWindowsPath(text).is_absolute()):
        return text
    return PurePosixPath(text).name if here else PureWindowsPath(text).name


def scrubbed(text: str, inputs: Sequence[Input]) -> str:
    """Running text, such as a note, with every input's name for what the user called it."""
    for one in sorted(inputs, key=lambda one: -len(one.ref)):
        if "/" in one.ref or "\\" in one.ref:
            text = text.replace(one.ref, one.name)
    return text


def stated(inputs: Sequence[Input], key: str) -> list[str]:
    """What the inputs' cards list under ``key`` (``datasets``, ``language``), each once, in order."""
    found: list[str] = []
    for one in inputs:
        value = one.card.get(key)
        entries = value if isinstance(value, list) else [value]
        found += [entry for entry in entries if isinstance(entry, str) and _WORD.fullmatch(entry)]
    return list(dict.fromkeys(found))


def _exists(text: str) -> bool:
    try:
        return Path(text).exists()
    except OSError:  # too long for a path
        return False


def _on_hub(place: Path) -> tuple[str | None, str | None, str]:
    """Id, revision and subfolder of a path in a Hub's cache: ``models--ORG--NAME/snapshots/REVISION/...``."""
    parts = place.parts
    for at in range(len(parts) - 1, 1, -1):
        match = _REPOSITORY.fullmatch(parts[at - 2])
        if match and parts[at - 1] == "snapshots":
            below = parts[at + 1 :] if place.is_dir() else parts[at + 1 : -1]
            return match[1].replace("--", "/"), parts[at], "/".join(below)
    return None, None, ""


def _card_of(folder: Path) -> tuple[dict[str, Any], str | None]:
    """The metadata of the card in ``folder``, all scalars as text; and why there is none where it is broken."""
    path = folder / CARD
    if not path.is_file():
        return {}, None
    with path.open("rb") as file:
        text = file.read(LARGEST).decode("utf-8", errors="replace")
    match = FRONT.match(text)
    if match is None:
        return {}, None
    try:
        # As text: a plain ``no`` is the Norwegian language, not false.
        data = yaml.load(match[1], Loader=yaml.BaseLoader)
    except (yaml.YAMLError, RecursionError) as error:
        return {}, f"the metadata of its {CARD} cannot be read ({str(error).splitlines()[0][:80]})"
    if not isinstance(data, dict):
        return {}, None
    return {str(key): value for key, value in data.items()}, None
