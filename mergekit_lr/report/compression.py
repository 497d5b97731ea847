"""What became of an adapter that was compressed or converted, per module and in total."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Literal

import torch

from mergekit_lr.adapter.adapter import Adapter

# Rounding a balanced pair of factors changes their product by this times eps of the dtype, in relative Frobenius
# norm: 0.212 eps is the rms rounding error of one factor, and two independent ones add in squares.
ROUNDING = 0.212 * math.sqrt(2)


@dataclass(frozen=True)
class ModuleChange:
    """One adapted parameter.

    state: what was done: ``compressed``, ``kept`` as it was, ``decomposed`` from a change in full, ``folded`` (DoRA),
    ``dropped``, and for experts ``split`` or ``fused``. rank_before, rank: of its factors. stored_before, stored:
    numbers in them. squared_norm: ||delta||^2. squared_error: the part of it that was lost, before rounding to the
    dtype of the file. reason: why it is in this state. singular_values: of the source's change, as far as they were
    computed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    state: str
    rank_before: int
    rank: int
    stored_before: int
    stored: int
    squared_norm: float
    squared_error: float = 0.0
    reason: str = ""
    singular_values: tuple[float, ...] = ()

    @property
    def energy(self) -> float:
        """Share of the delta's squared norm that is kept."""
        return 1.0 - self.squared_error / self.squared_norm if self.squared_norm else 1.0

    @property
    def error(self) -> float:
        """Relative Frobenius error."""
        return math.sqrt(self.squared_error / self.squared_norm) if self.squared_norm else 0.0


@dataclass(frozen=True)
class Kept:
    """A tensor beside the factors: ``part`` is saved, token rows, added, bias or magnitude; ``state`` what became of
    it."""

    name: str
    part: str
    state: str
    nbytes: int


@dataclass(frozen=True)
class AdapterReport:
    """The result of ``compress`` or ``convert``.

    out: where the adapter was written, None in memory. source, dialect: what was read. to: the dialect written.
    target: the server that it was made for. dtype: of the factors that were computed. modules: in the source's order.
    others: everything that is no factors. notes: what a user should know. bytes_before, bytes_after: of the adapter's
    file. peak_bytes: the most memory held. adapter: the result where it was asked for in memory.
    """

    verb: Literal["compress", "convert"]
    out: str | None
    source: str
    dialect: str
    to: str
    target: str | None
    base: str | None
    dtype: str
    modules: tuple[ModuleChange, ...]
    others: tuple[Kept, ...]
    notes: tuple[str, ...]
    bytes_before: int
    bytes_after: int
    peak_bytes: int
    seconds: float
    adapter: Adapter | None = field(default=None, repr=False, compare=False)

    @property
    def squared_norm(self) -> float:
        """Squared norm of all deltas together."""
        return sum(m.squared_norm for m in self.modules)

    @property
    def energy(self) -> float:
        """Share of the squared norm of all deltas that is kept."""
        total = self.squared_norm
        return 1.0 - sum(m.squared_error for m in self.modules) / total if total else 1.0

    @property
    def error(self) -> float:
        """Relative Frobenius error over all modules."""
        return math.sqrt(max(1.0 - self.energy, 0.0))

    @property
    def rounding(self) -> float:
        """Relative error that rounding the computed factors to ``dtype`` adds to each of them."""
        return ROUNDING * torch.finfo(getattr(torch, self.dtype)).eps

    @property
    def rank_before(self) -> int:
        """Sum of the ranks that the source had."""
        return sum(m.rank_before for m in self.modules)

    @property
    def total_rank(self) -> int:
        """Sum of the ranks of the result."""
        return sum(m.rank for m in self.modules)

    @property
    def worst(self) -> ModuleChange | None:
        """The module with the largest relative error."""
        return max(self.modules, key=lambda m: m.error, default=None)

    @property
    def states(self) -> dict[str, int]:
        """How many modules and other tensors ended in which state."""
        return dict(Counter([m.state for m in self.modules] + [o.state for o in self.others]))

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        fields = asdict(replace(self, adapter=None, modules=()))
        del fields["adapter"]
        fields["modules"] = [asdict(m) | {"energy": m.energy, "error": m.error} for m in self.modules]
        totals = {
            "energy": self.energy,
            "error": self.error,
            "rounding": self.rounding,
            "rank_before": self.rank_before,
            "total_rank": self.total_rank,
            "states": self.states,
            "worst": self.worst.name if self.worst else None,
        }
        return {"totals": totals, **fields}


def kept_tensors(adapter: Adapter, left_out: tuple[str, ...] = ()) -> list[Kept]:
    """Everything of an adapter that is no factors, for the report."""
    others = [("saved", name, tensor) for name, tensor in adapter.saved.items()]
    others += [("token rows", name, rows) for name, (_, rows) in adapter.token_rows.items()]
    others += [("added", name, tensor) for name, tensor in adapter.added.items()]
    for name, weight in adapter.weights.items():
        beside = (("bias", weight.bias), ("magnitude", weight.magnitude))
        others += [(part, name, tensor) for part, tensor in beside if tensor is not None]
    return [
        Kept(name, part, "left out" if name in left_out else "kept", tensor.nbytes) for part, name, tensor in others
    ]
