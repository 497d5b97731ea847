"""What a run has finished, on disk: a killed run continues where it stopped, and results need not stay in memory.

``results.bin`` holds the tensors of finished nodes one after another, ``journal.jsonl`` one line for each node with
its figures and where its tensors lie. A line is written after its tensors, so a torn last line only means that its
node is computed again.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.checkpoint.safetensors import DTYPE_NAMES, DTYPES, TensorInfo, read_tensor
from mergekit_lr.checkpoint.writer import out_of_space

ALIGNMENT = 64  # bytes; every tensor starts at a multiple


class Journal:
    """Finished nodes by name.

    Args:
        folder: where the two files lie; it exists.
        fingerprint: what must be the same for old results to count (see ``fingerprint``).
        resume: continue an earlier journal of the same fingerprint; otherwise start anew.
    """

    def __init__(self, folder: Path, fingerprint: str, *, resume: bool = False):
        self._lines = folder / "journal.jsonl"
        self._data = folder / "results.bin"
        self.figures: dict[str, dict[str, Any]] = {}
        self._places: dict[str, dict[str, TensorInfo]] = {}
        self.resumed = self._load(fingerprint) if resume and self._lines.exists() else 0
        if not self.resumed:
            self._data.write_bytes(b"")
            self._lines.write_text(json.dumps({"fingerprint": fingerprint}) + "\n", encoding="utf-8")
        self._out = os.open(self._data, os.O_RDWR)
        self._log = self._lines.open("a", encoding="utf-8")

    def __contains__(self, name: str) -> bool:
        return name in self.figures

    def add(self, name: str, tensors: Mapping[str, Tensor], figures: dict[str, Any]) -> None:
        """Record node ``name`` as finished, with its tensors and its figures (anything that JSON holds).

        Raises:
            CapacityError: the disk is full.
        """
        places: dict[str, TensorInfo] = {}
        try:
            position = os.lseek(self._out, 0, os.SEEK_END)
            for key, tensor in tensors.items():
                position += -position % ALIGNMENT
                data = tensor.detach().cpu().contiguous()
                places[key] = TensorInfo(data.dtype, tuple(data.shape), self._data, position, data.nbytes)
                view = memoryview(data.reshape(-1).view(torch.uint8).numpy().data)
                while view.nbytes:
                    written = os.pwrite(self._out, view, position)
                    view, position = view[written:], position + written
            stored = {key: [DTYPE_NAMES[p.dtype], list(p.shape), p.offset] for key, p in places.items()}
            self._log.write(json.dumps({"name": name, "tensors": stored, "figures": figures}) + "\n")
            self._log.flush()
        except OSError as error:
            raise out_of_space(error, self._data) from None
        self._places[name], self.figures[name] = places, figures

    def forget(self, name: str) -> None:
        """Let node ``name`` be computed again, in a resumed run too; its later result counts."""
        self._log.write(json.dumps({"forget": name}) + "\n")
        self._log.flush()
        del self.figures[name]

    def keys(self, name: str) -> list[str]:
        """Keys of the tensors of node ``name``."""
        return list(self._places[name])

    def tensor(self, name: str, key: str) -> Tensor:
        """Tensor ``key`` of node ``name``, mapped from the disk."""
        return read_tensor(self._places[name][key])

    def close(self) -> None:
        """Close both files and remove them: the results are in the output now."""
        os.close(self._out)
        self._log.close()
        self._data.unlink()
        self._lines.unlink()

    def _load(self, fingerprint: str) -> int:
        lines = self._lines.read_bytes().split(b"\n")
        entries = [entry for line in lines[:-1] if (entry := _parsed(line)) is not None]
        if not entries or entries[0].get("fingerprint") != fingerprint or not self._data.exists():
            return 0
        size = self._data.stat().st_size
        for entry in entries[1:]:
            if "forget" in entry:
                self.figures.pop(entry["forget"], None)
                continue
            places = {}
            for key, (dtype, shape, offset) in entry["tensors"].items():
                nbytes = math.prod(shape) * DTYPES[dtype].itemsize
                places[key] = TensorInfo(DTYPES[dtype], tuple(shape), self._data, offset, nbytes)
            if all(p.offset + p.nbytes <= size for p in places.values()):
                self._places[entry["name"]], self.figures[entry["name"]] = places, entry["figures"]
        # What follows the last whole line is torn.
        with self._lines.open("r+b") as file:
            file.truncate(sum(len(line) + 1 for line in lines[:-1]))
        return len(self.figures)


class NoJournal(Journal):
    """Keeps nothing: for stages whose results are of no use, or lie elsewhere."""

    def __init__(self):
        self.figures = {}

    def add(self, name: str, tensors: Mapping[str, Tensor], figures: dict[str, Any]) -> None:
        """Nothing."""


def fingerprint(*parts: Any) -> str:
    """A digest of everything that a result depends on: options, inputs by name, size and time of change."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()


def _parsed(line: bytes) -> dict[str, Any] | None:
    try:
        return json.loads(line)
    except ValueError:
        return None
