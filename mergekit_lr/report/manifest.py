"""The manifest: ``lrmerge.json`` beside every output, with all that is needed to judge it and to make it again."""

from __future__ import annotations

import hashlib
import json
import platform
import uuid
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # a manifest is read without torch
    from mergekit_lr.checkpoint.checkpoint import Checkpoint

FILE = "lrmerge.json"
FORMAT = 1


def manifest(
    verb: str, inputs: dict[str, Checkpoint], options: dict[str, Any], result: dict[str, Any]
) -> dict[str, Any]:
    """The content of a manifest, ready for JSON."""
    return {
        "format": FORMAT,
        "verb": verb,
        "versions": versions(),
        "inputs": {role: describe(checkpoint) for role, checkpoint in inputs.items()},
        "options": options,
        **result,
    }


def write_manifest(folder: Path, content: dict[str, Any]) -> None:
    """Write ``content`` as ``lrmerge.json`` into ``folder``."""
    (folder / FILE).write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")


def describe(checkpoint: Checkpoint) -> dict[str, Any]:
    """What a checkpoint was: its reference, revision where the Hub gave one, and each file with size and digest.

    A file from the Hub's cache is known there by the SHA-256 of its content. Of any other file the header's digest is
    given: it names every tensor and place, and costs no pass over the weights. A file of the Hub of which no more
    than the header was needed is named only: the revision says the rest.
    """
    files = []
    for path in checkpoint.files if checkpoint.folder else []:
        entry: dict[str, Any] = {"file": path.name}
        files.append(entry)
        if checkpoint.remote is not None and not path.exists():
            continue
        entry["bytes"] = path.stat().st_size
        blob = path.resolve().name
        if path.is_symlink() and len(blob) == 64:
            entry["sha256"] = blob
        elif path.suffix == ".safetensors":
            entry["header_sha256"] = _header_digest(path)
    described: dict[str, Any] = {"ref": checkpoint.ref, "bytes": checkpoint.nbytes, "files": files}
    if revision := _revision(checkpoint):
        described["revision"] = revision
    return described


def state(checkpoint: Checkpoint) -> Any:
    """What is another when a checkpoint is another than before, ready for JSON: for runs that go on after a break.

    A revision of the Hub is always the same. Of files here size and time of change count beside what ``describe`` says.
    Tensors in memory bear no mark of their content: their state is never the same again.
    """
    if checkpoint.folder is None:
        return uuid.uuid4().hex
    if revision := _revision(checkpoint):
        return [checkpoint.ref, revision]
    return [describe(checkpoint), state_of_files(checkpoint.files)]


def state_of_files(files: Iterable[Path]) -> list[list[Any]]:
    """The same of the files of an adapter; one without files is in memory."""
    found = [[str(file), file.stat().st_size, file.stat().st_mtime_ns] for file in files]
    return found or [[uuid.uuid4().hex]]


def _revision(checkpoint: Checkpoint) -> str | None:
    """The commit on the Hub whose files a checkpoint has."""
    folder = checkpoint.folder
    if folder is None or folder.parent.name != "snapshots" or not folder.parent.parent.name.startswith("models--"):
        return None
    return folder.name


def versions() -> dict[str, str]:
    """Versions of lrmerge, of Python and of the libraries that decide the numbers."""
    found = {"python": platform.python_version()}
    for package in ("lrmerge", "torch", "safetensors", "huggingface-hub", "transformers", "peft"):
        try:
            found[package] = version(package)
        except PackageNotFoundError:
            continue
    return found


def _header_digest(path: Path) -> str:
    with path.open("rb") as file:
        length = file.read(8)
        return hashlib.sha256(length + file.read(int.from_bytes(length, "little"))).hexdigest()
