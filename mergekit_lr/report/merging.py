"""What a merge did, per tensor and in total."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from mergekit_lr.adapter.adapter import Adapter
    from mergekit_lr.verbs.compare import CompareReport


@dataclass(frozen=True)
class MergedTensor:
    """One tensor of the result, or one module of a merged adapter.

    state: merged, copied, converted or aligned. rule: the method with its parameters, in words. squared_norm: of its
    distance from the base (from the first model where there is none; of an adapter's delta itself). rounding: squared
    norm of what rounding changed, or of what truncation cut off. rank: of an adapter's module. opcm: of a merge by
    opcm, what a later one goes on from: the count of models, and for each matrix the scale and the mean norm.
    """

    name: str
    shape: tuple[int, ...]
    state: str
    rule: str
    squared_norm: float
    rounding: float
    rank: int | None = None
    opcm: dict[str, Any] | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(self.squared_norm)

    @property
    def error(self) -> float:
        """What rounding, or truncation, lost of the change, relative to its norm."""
        return math.sqrt(self.rounding / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class MergeReport:
    """The result of ``merge``.

    out: its folder, None in memory. kind: model or adapter. method: its name. models: what was merged. tensors: every
    tensor of the result, in order. states: how many are merged, copied, converted. result: the tensors themselves
    where they were asked for in memory; adapter: likewise. format: the dialect of an adapter. target: the server that
    it was made for. similarity: of the inputs' changes, where it was asked for.
    """

    out: str | None
    kind: str
    method: str
    space: str
    base: str | None
    models: tuple[str, ...]
    tensors: tuple[MergedTensor, ...]
    states: dict[str, int]
    files: dict[str, int]
    config: dict[str, Any]
    notes: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    seconds: float
    vocabulary: dict[str, Any] | None = None
    similarity: CompareReport | None = None
    result: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)
    adapter: Adapter | None = field(default=None, repr=False, compare=False)
    format: str | None = None
    target: str | None = None

    @property
    def norm(self) -> float:
        """Frobenius norm of the whole change."""
        return math.sqrt(sum(tensor.squared_norm for tensor in self.tensors))

    @property
    def rounding_error(self) -> float:
        """What rounding, or truncation, lost of the change, relative to its norm."""
        lost, whole = (sum(getattr(t, key) for t in self.tensors) for key in ("rounding", "squared_norm"))
        return math.sqrt(lost / whole) if whole else 0.0

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        fields = asdict(replace(self, tensors=(), result=None, adapter=None))
        del fields["result"], fields["adapter"]
        fields["dialect"] = fields.pop("format")  # a manifest's "format" is its own
        fields["tensors"] = [asdict(tensor) for tensor in self.tensors]
        return {"totals": {"norm": self.norm, "rounding_error": self.rounding_error, **self.states}, **fields}
