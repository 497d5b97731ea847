"""What of a folder goes up: the result and nothing else, checked to load before a byte is sent."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from mergekit_lr.adapter.open import is_adapter, is_computed, open_adapter
from mergekit_lr.adapter.peft_write import PREFIX
from mergekit_lr.checkpoint.checkpoint import Checkpoint, read_config
from mergekit_lr.checkpoint.safetensors import read_header
from mergekit_lr.errors import FormatError, UsageError
from mergekit_lr.report.manifest import FILE

TEXT = (".json", ".md", ".txt", ".jinja", ".yaml", ".yml", ".py", ".html", ".svg")
BINARY = (".safetensors", ".model", ".tiktoken", ".png")
# Bare words in large number: no text that anybody wrote, and some look like paths.
VOCABULARIES = ("tokenizer.json", "vocab.json", "vocab.txt", "merges.txt", "added_tokens.json")


@dataclass(frozen=True)
class Part:
    """One file of the result. text: what is sent in its place; None sends the file as it lies there."""

    name: str
    path: Path
    text: str | None = None

    @property
    def nbytes(self) -> int:
        """Size of what is sent."""
        return self.path.stat().st_size if self.text is None else len(self.text.encode())

    @property
    def is_vocabulary(self) -> bool:
        """Whether its lines are words of a tokenizer."""
        return self.name in VOCABULARIES


@dataclass(frozen=True)
class Contents:
    """A result that loads.

    folder: where it lies. kind: model or adapter. parts: its files. left: name of what stays here, and why. manifest:
    what lrmerge.json says, empty where another tool made the folder. config: adapter_config.json or config.json.
    metadata: the string metadata of its weights by file.
    """

    folder: Path
    kind: str
    parts: tuple[Part, ...]
    left: dict[str, str]
    manifest: dict[str, Any]
    config: dict[str, Any]
    metadata: dict[str, dict[str, str]] = field(default_factory=dict)

    def text_of(self, name: str) -> str | None:
        """The text that is sent as ``name``; None where there is no such file."""
        return next((part.text for part in self.parts if part.name == name), None)

    def with_texts(self, texts: Mapping[str, str]) -> Contents:
        """The same with other texts in some places."""
        return replace(self, parts=tuple(replace(part, text=texts.get(part.name, part.text)) for part in self.parts))


def read_folder(folder: str | Path) -> Contents:
    """What ``folder`` holds, with every header and configuration read.

    Raises:
        UsageError: it is no folder.
        FormatError: it holds no result, or one that does not load, with the file that is wrong.
    """
    place = Path(folder).expanduser()
    if place.is_file():
        raise UsageError(f"{place}: is one file; push sends a folder, so put it into one of its own")
    if not place.is_dir():
        raise UsageError(f"{place}: no such folder")
    kind, weights, config = _loaded(place)
    parts, left = [], {}
    for path in sorted(place.iterdir()):
        reason = _stays(path, weights)
        if reason:
            left[path.name] = reason
        else:
            parts.append(Part(path.name, path, _text(path) if _is_text(path) else None))
    found = next((part.path for part in parts if part.name == FILE or part.name.endswith(f".{FILE}")), None)
    manifest = read_config(found) if found else {}
    metadata = {path.name: read_header(path)[1] for path in weights}
    return Contents(place.resolve(), kind, tuple(parts), left, manifest, config, metadata)


def _loaded(folder: Path) -> tuple[str, list[Path], dict[str, Any]]:
    """Kind, weight files and configuration of what ``folder`` holds; reading it is the check."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise FormatError(f"{folder}: holds no .safetensors file, so there is nothing to push (pickles are not sent)")
    if is_adapter(folder):
        config, weights = read_config(folder / "adapter_config.json"), folder / "adapter_model.safetensors"
        if not weights.exists():
            raise FormatError(f"{folder}: has an adapter_config.json and no adapter_model.safetensors")
        tensors, _ = read_header(weights)
        if not is_computed(config):  # else its factors mean something beside their base alone
            open_adapter(folder)
            strange = [name for name in tensors if not name.startswith(PREFIX)]
            if strange:
                raise FormatError(f"{weights}: holds {min(strange)}, a name under which PEFT loads nothing")
        return "adapter", [weights], config
    if len(files) == 1 and not (folder / "config.json").exists() and is_adapter(files[0]):
        open_adapter(files[0])
        return "adapter", files, {}
    checkpoint = Checkpoint.open(folder)
    return "model", checkpoint.files, checkpoint.config


def _stays(path: Path, weights: list[Path]) -> str:
    """Why a file stays here; empty for one that goes."""
    if path.name.startswith("."):
        return "hidden"
    if path.is_dir():
        return "a folder"
    if path.suffix == ".safetensors" and path not in weights:
        return "weights that are no part of the result"
    licence = path.name.startswith(("LICENSE", "LICENCE", "NOTICE"))
    if path.suffix in (*TEXT, *BINARY) or licence:
        return ""
    return "no file of a result"


def _is_text(path: Path) -> bool:
    return path.suffix not in BINARY


def _text(path: Path) -> str:
    try:
        return path.read_bytes().decode()  # as it is: reading as text would change its line ends
    except (OSError, UnicodeDecodeError) as error:
        raise FormatError(f"{path}: cannot be read as text ({error})") from None
