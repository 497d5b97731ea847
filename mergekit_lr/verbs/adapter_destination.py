"""Where ``compress`` and ``convert`` write: a PEFT folder or one file, whole or not at all, with its manifest."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from safetensors.torch import load_file

from mergekit_lr.adapter import comfy, diffusers, kohya, lycoris, peft
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.file import write_file
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft_config import module_of
from mergekit_lr.adapter.target import SERVERS, rewrite_config
from mergekit_lr.checkpoint.checkpoint import Checkpoint
from mergekit_lr.checkpoint.folder import OutputFile, OutputFolder
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.checkpoint.writer import out_of_space
from mergekit_lr.errors import UsageError
from mergekit_lr.graph.resources import peak_bytes
from mergekit_lr.report.card import notes_of
from mergekit_lr.report.compression import AdapterReport
from mergekit_lr.report.compression_card import write_adapter_card
from mergekit_lr.report.inputs import Input
from mergekit_lr.report.manifest import manifest, write_manifest
from mergekit_lr.verbs.adapter_source import PEFT_FILE, Base, Source

WRITERS: dict[str, Callable[[Adapter, Path], None]] = {
    "kohya": kohya.save_kohya,
    "lycoris": lycoris.save_lycoris,
    "diffusers": diffusers.save_diffusers,
    "comfy": comfy.save_comfy,
}
DIALECTS = ("peft", *WRITERS)


class Destination:
    """Where the result goes. Made before any work is done; what is unfinished goes away with it.

    Args:
        out: the folder, or the file for the dialects of image tools. to: the dialect. overwrite: whether an earlier
            result may be replaced. inputs: what the work reads, which it must never replace.

    Raises:
        UsageError: ``out`` exists, is an input, cannot be written, or is a folder's name where a file is written (or
            the other way round).
    """

    def __init__(self, out: str | Path, to: str, *, overwrite: bool, inputs: Iterable[Path]):
        self.to, self.out = to, Path(out).expanduser()
        file = self.out.suffix == ".safetensors"
        if to == "peft" and file:
            raise UsageError(f"{self.out}: a PEFT adapter is a folder; leave .safetensors off --out")
        if to != "peft" and (not file or self.out.is_dir()):
            raise UsageError(f"{self.out}: a {to} adapter is one file; --out ends in .safetensors")
        self._folder = (OutputFolder if to == "peft" else OutputFile)(out, overwrite=overwrite, inputs=inputs)

    def __enter__(self) -> Destination:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None):
        if kind is not None:
            self._folder.discard()

    def write(
        self,
        adapter: Adapter,
        report: AdapterReport,
        source: Source,
        base: Base | None,
        *,
        options: dict[str, Any],
        started: float,
    ) -> AdapterReport:
        """Write the adapter with its manifest, and a folder's card; the report with the size and time of all of it.

        Raises:
            LrmergeError: the dialect cannot hold the adapter, or the disk is full or closed to us.
        """
        report = replace(report, out=str(self.out))
        try:
            write = self._write_folder if self.to == "peft" else self._write_file
            report = write(self._folder.partial, adapter, report, source, base, options, started)
            self._folder.finish()
        except OSError as problem:
            if (full := out_of_space(problem, self.out)) is not problem:
                raise full from None
            raise UsageError(f"{self.out}: cannot be written ({problem.strerror}); choose another --out") from None
        return report

    def _write_folder(self, folder: Path, adapter, report, source, base, options, started) -> AdapterReport:
        file = folder / PEFT_FILE
        save_peft(adapter, folder, base.layout if base is not None else None)
        if adapter.metadata:
            write_file(file, load_file(file), {"format": "pt", **adapter.metadata})
        if report.target in SERVERS:
            rewrite_config(folder)
        report = _completed(report, file.stat().st_size, started)
        origins = [Input.of("adapter", source.ref, source.path, metadata=source.adapter.metadata)]
        if base is not None:
            held = base.checkpoint
            origins.append(Input.of("base", held.ref, held.folder, config=held.config))
        report = replace(report, notes=(*report.notes, *notes_of(origins)))
        write_adapter_card(report, origins, options, folder)
        write_manifest(folder, _manifest(report, source, base, options))
        return report

    def _write_file(self, folder: Path, adapter, report, source, base, options, started) -> AdapterReport:
        if self.to == "diffusers":
            adapter = replace(adapter, weights={n: _scaling_folded(w) for n, w in adapter.weights.items()})
        file = folder / OutputFile.FILE
        WRITERS[self.to](adapter, file)
        report = _completed(report, file.stat().st_size, started)
        write_manifest(folder, _manifest(report, source, base, options))
        return report


def _completed(report: AdapterReport, size: int, started: float) -> AdapterReport:
    return replace(report, bytes_after=size, peak_bytes=peak_bytes(), seconds=time.perf_counter() - started)


def _manifest(report: AdapterReport, source: Source, base: Base | None, options: dict[str, Any]) -> dict[str, Any]:
    inputs: dict[str, Checkpoint] = {"adapter": source.described()}
    if base is not None:
        inputs["base"] = base.checkpoint
    return manifest(report.verb, inputs, options, report.to_json())


def save_peft(adapter: Adapter, folder: Path, layout: Layout | None, *, dtype: torch.dtype | None = None) -> None:
    """Write a PEFT folder that changes the ends of a tie that ``adapter`` names, and no other.

    A LoRA on a table leaves the head that shares it alone, and so does a table of ``modules_to_save``: PEFT puts a
    copy in its place. What else is saved in full goes into the base itself, and so into every end.

    Args:
        adapter: what to write. folder: an existing folder. layout: of the base, where it is known. dtype: what the
            factors are rounded to; None leaves them.

    Raises:
        LrmergeError: PEFT cannot hold the adapter.
    """
    if layout is not None and not adapter.weights.keys() <= layout.by_name.keys():
        layout = None  # single experts, under names that only the disk has
    if layout is not None:
        modules = tuple(adapter.config.get("modules_to_save") or ())
        saved = dict(adapter.saved)
        for name in adapter.saved:
            if name in layout.by_name and not module_of(name).endswith(modules):
                for end in layout.ends(layout.ties.get(name, name)):
                    saved.setdefault(end.name, adapter.saved[name])
        adapter = replace(adapter, saved=saved)
        layout = replace(layout, parameters=(*layout.parameters, *layout.tied), tied=(), ties={})
    peft.save(with_axes(adapter), folder, dtype=dtype, layout=layout)


def with_axes(adapter: Adapter) -> Adapter:
    """DoRA magnitudes in PEFT's axes: a convolution's as (1, d_out, 1, ...).

    Raises:
        UsageError: a DoRA over input channels.
    """
    weights: dict[str, AdaptedWeight] = {}
    for name, weight in adapter.weights.items():
        magnitude = weight.magnitude
        if magnitude is not None and weight.kind in (Kind.LINEAR, Kind.CONVOLUTION) and magnitude.ndim == 2:
            raise UsageError(
                f"{name}: a DoRA over input channels exists in LyCORIS files only; fold it with --dora fold"
            )
        if magnitude is not None and weight.kind is Kind.CONVOLUTION and weight.shape is not None:
            weight = replace(weight, magnitude=magnitude.reshape(1, -1, *(1 for _ in weight.shape[2:])))
        weights[name] = weight
    return replace(adapter, weights=weights)


def _scaling_folded(weight: AdaptedWeight) -> AdaptedWeight:
    """Scaling 1, in the dtype of the factors where that loses nothing (a scale of 2, a half ...)."""
    delta = weight.delta
    if delta.scaling == 1:
        return weight
    folded = delta.folded()
    narrow = folded.B.to(delta.B.dtype)
    B = narrow if torch.equal(narrow.to(folded.B.dtype), folded.B) else folded.B
    bias = None if weight.bias is None else weight.bias * delta.scaling
    return replace(weight, delta=LowRank(delta.A, B), bias=bias)
