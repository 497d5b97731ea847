"""What the page reads of a manifest, or of ``compare --json``: checked, and nothing else of it is looked at.

Manifests are written by ``mergekit_lr.report.extraction``, ``compression``, ``merging`` and ``application``.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError

from mergekit_lr.errors import FormatError, UsageError
from mergekit_lr.report.manifest import FILE, FORMAT


def _finite(value: float) -> float:
    if not math.isfinite(value):
        raise ValueError("a number is expected, not NaN or infinity")
    return value


Number = Annotated[float, AfterValidator(_finite)]
Matrix = list[list[Number]]


class _Read(BaseModel):
    model_config = ConfigDict(extra="ignore", frozen=True)


class Module(_Read):
    """A module or tensor of any verb's manifest; which fields it has depends on the verb."""

    name: str
    kind: str = ""
    shape: list[int] = []
    state: str = ""
    rule: str = ""
    reason: str = ""
    by: str = ""
    rank: int | None = None
    rank_before: int | None = None
    squared_norm: Number = 0.0
    kept: Number | None = None
    squared_error: Number = 0.0
    rounding: Number = 0.0
    singular_values: list[Number] = []


class Other(_Read):
    """A tensor beside the factors."""

    name: str
    state: str
    part: str = ""
    reason: str = ""


class ComparedModule(_Read):
    """See ``mergekit_lr.verbs.compare.ModuleComparison``."""

    name: str
    tasks: list[int]
    norms: list[Number]
    inner: Matrix
    output: Matrix
    input: Matrix
    opposite: Matrix
    interference: Number


class Comparison(_Read):
    """See ``mergekit_lr.verbs.compare.CompareReport``."""

    names: list[str]
    norms: list[Number]
    cosine: Matrix
    output: Matrix
    input: Matrix
    opposite: Matrix
    interference: Number
    modules: list[ComparedModule]
    alone: dict[str, int] = {}
    hints: list[str] = []


class Weighted(_Read):
    """An adapter that was applied or merged."""

    ref: str = ""
    weight: Number | None = None


class Totals(_Read):
    """Figures of a whole result; which of them it has depends on the verb."""

    energy: Number | None = None
    error: Number | None = None
    total_rank: int | None = None
    rank_before: int | None = None
    norm: Number | None = None
    rounding_error: Number | None = None
    worst: str | None = None


class Manifest(_Read):
    """``lrmerge.json`` of any verb."""

    format: int
    verb: Literal["extract", "compress", "convert", "merge", "apply"]
    out: str | None = None
    base: str | None = None
    finetuned: str = ""
    source: str = ""
    kind: str = ""
    method: str = ""
    space: str = ""
    models: list[str] = []
    adapters: list[Weighted] = []
    dtype: str = ""
    to: str = ""
    unmerge: bool = False
    versions: dict[str, str] = {}
    options: dict[str, Any] = {}
    recipe: dict[str, Any] | None = None
    totals: Totals = Totals()
    states: dict[str, int] = {}
    notes: list[str] = []
    modules: list[Module] = []
    tensors: list[Module] = []
    changed: list[Module] = []
    others: list[Other] = []
    files: dict[str, int] = {}
    adapter_bytes: int = 0
    finetuned_bytes: int = 0
    bytes_before: int = 0
    bytes_after: int = 0
    written_bytes: int = 0
    peak_bytes: int = 0
    seconds: Number = 0.0
    similarity: Comparison | None = None


def read(path: Path) -> Manifest | Comparison:
    """The manifest of a result: its folder, or a JSON file; also what ``compare --json`` printed.

    Raises:
        UsageError: there is no manifest.
        FormatError: it is damaged, or a newer version wrote it.
    """
    file = path / FILE if path.is_dir() else path
    if file.suffix == ".safetensors":
        file = file.with_suffix(".lrmerge.json")
    if not file.is_file():
        raise UsageError(f"{path}: no {file.name} is there; a report is of what lrmerge has written")
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise FormatError(f"{file}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise FormatError(f"{file}: holds no manifest but a {type(content).__name__}")
    if isinstance(content.get("format"), int) and content["format"] > FORMAT:
        raise FormatError(f"{file}: is of format {content['format']}, this version knows {FORMAT}; install a newer one")
    kind = Comparison if "format" not in content and "cosine" in content else Manifest
    try:
        return kind.model_validate(content)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(f"{file}: {where}: {first['msg'].lower()}; the manifest is damaged") from None
