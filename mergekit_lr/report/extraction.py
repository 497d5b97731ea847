"""What an extraction did and what it lost, per module and in total."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field
from typing import Any

from mergekit_lr.adapter.adapter import Adapter


@dataclass(frozen=True)
class ModuleFigures:
    """One decomposed parameter.

    rank: of its factors. stored: numbers in them. squared_norm: ||delta||^2. kept: the part of it that the factors
    hold. excess: the certificate of the truncation, a bound on how far its error is above the least possible one at
    this rank (0.01 is 1 %). singular_values: of the delta as far as they were computed; of a stack, the root of
    the summed squares over its experts. seconds: of computing.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    rank: int
    stored: int
    squared_norm: float
    kept: float
    excess: float
    seconds: float
    singular_values: tuple[float, ...] = ()

    @property
    def energy(self) -> float:
        """Share of the delta's squared norm that is kept."""
        return self.kept / self.squared_norm if self.squared_norm else 1.0

    @property
    def error(self) -> float:
        """Relative Frobenius error of the factors' product."""
        return math.sqrt(max(1.0 - self.energy, 0.0))


@dataclass(frozen=True)
class Carried:
    """A parameter outside the factors: ``state`` is saved, left out, unchanged, tied or unused, and ``reason`` why."""

    name: str
    state: str
    squared_norm: float = 0.0
    reason: str = ""


@dataclass(frozen=True)
class ExtractReport:
    """The result of ``extract``.

    out: the adapter's folder, None in memory. layout: how the parameters of the model were known. modules: decomposed
    parameters in model order. others: every other tensor of both inputs with its state. notes: what a user of the
    adapter should know. adapter_bytes: size of the result. finetuned_bytes: of the fine-tune. read_bytes: of what was
    read. peak_bytes: the most memory held. adapter: the result itself where it was asked for in memory.
    """

    out: str | None
    base: str
    finetuned: str
    dtype: str
    layout: str
    modules: tuple[ModuleFigures, ...]
    others: tuple[Carried, ...]
    notes: tuple[str, ...]
    adapter_bytes: int
    finetuned_bytes: int
    read_bytes: int
    peak_bytes: int
    seconds: float
    adapter: Adapter | None = field(default=None, repr=False, compare=False)

    @property
    def changed(self) -> float:
        """Squared norm of the whole change: decomposed, saved and left out."""
        return sum(m.squared_norm for m in self.modules) + sum(o.squared_norm for o in self.others)

    @property
    def energy(self) -> float:
        """Share of the whole change that the adapter carries, by factors or in full."""
        carried = sum(m.kept for m in self.modules) + sum(o.squared_norm for o in self.others if o.state == "saved")
        return carried / self.changed if self.changed else 1.0

    @property
    def error(self) -> float:
        """Relative Frobenius error of the adapter against the whole change."""
        return math.sqrt(max(1.0 - self.energy, 0.0))

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of all modules."""
        return sum(module.rank for module in self.modules)

    @property
    def worst(self) -> ModuleFigures | None:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda module: module.error, default=None)

    @property
    def states(self) -> dict[str, int]:
        """How many parameters ended in which state."""
        return dict(Counter(["decomposed"] * len(self.modules) + [other.state for other in self.others]))

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        fields = {key: value for key, value in asdict(_without_adapter(self)).items() if key != "adapter"}
        fields["modules"] = [asdict(m) | {"energy": m.energy, "error": m.error} for m in self.modules]
        worst = self.worst
        totals = {
            "energy": self.energy,
            "error": self.error,
            "total_rank": self.total_rank,
            "states": self.states,
            "worst": worst.name if worst else None,
        }
        return {"totals": totals, **fields}


def _without_adapter(report: ExtractReport) -> ExtractReport:
    from dataclasses import replace

    return replace(report, adapter=None, modules=())
