"""What applying adapters to a base did, per parameter and in total."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from torch import Tensor

# From here on rounding swallows so much of a change that the user should know.
SWALLOWED = 0.25


@dataclass(frozen=True)
class AppliedFigures:
    """One changed parameter.

    by: what changed it (factors, DoRA, in full ...). squared_norm: ||W' - W||^2 before rounding. rounding: squared
    norm of what rounding W' to its dtype changed.
    """

    name: str
    kind: str
    shape: tuple[int, ...]
    by: str
    squared_norm: float
    rounding: float

    @property
    def norm(self) -> float:
        """Frobenius norm of the change."""
        return math.sqrt(self.squared_norm)

    @property
    def rounding_error(self) -> float:
        """||round(W') - W'|| / ||W' - W||; 1 and more means that rounding swallows the change."""
        return _ratio(self.rounding, self.squared_norm)


@dataclass(frozen=True)
class ApplyReport:
    """The result of ``apply``.

    out: its folder, None in memory. adapters: (reference, weight, dialect). changed: in model order. states: how many
    tensors of the result are changed, new, converted or copied. files: of the result with their bytes. tensors: the
    result itself where it was asked for in memory; config: that goes with it.
    """

    out: str | None
    base: str
    adapters: tuple[tuple[str, float, str], ...]
    unmerge: bool
    dtype: str
    rounding: str
    layout: str
    changed: tuple[AppliedFigures, ...]
    states: dict[str, int]
    files: dict[str, int]
    config: dict[str, Any]
    notes: tuple[str, ...]
    read_bytes: int
    written_bytes: int
    peak_bytes: int
    seconds: float
    tensors: dict[str, Tensor] | None = field(default=None, repr=False, compare=False)

    @property
    def norm(self) -> float:
        """Frobenius norm of the change of all parameters together."""
        return math.sqrt(sum(figures.squared_norm for figures in self.changed))

    @property
    def rounding_error(self) -> float:
        """The rounding error of all parameters together over the norm of the change."""
        return _ratio(sum(f.rounding for f in self.changed), sum(f.squared_norm for f in self.changed))

    @property
    def swallowed(self) -> tuple[AppliedFigures, ...]:
        """Parameters whose change rounding spoils, the worst first."""
        bad = [figures for figures in self.changed if figures.rounding_error > SWALLOWED]
        return tuple(sorted(bad, key=lambda figures: -figures.rounding_error))

    @property
    def kinds(self) -> dict[str, int]:
        """How many parameters of which kind changed."""
        return dict(Counter(figures.kind for figures in self.changed))

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        fields = asdict(replace(self, tensors=None, changed=()))
        del fields["tensors"]
        fields["adapters"] = [{"ref": r, "weight": w, "dialect": d} for r, w, d in self.adapters]
        fields["changed"] = [asdict(f) | {"rounding_error": f.rounding_error} for f in self.changed]
        totals = {"norm": self.norm, "rounding_error": self.rounding_error, "states": self.states}
        return {"totals": totals, **fields}


def rounding_notes(changed: Sequence[AppliedFigures], dtype: str, rounding: str) -> list[str]:
    """A warning where the dtype of the result swallows much of some changes."""
    bad = sorted((f for f in changed if f.rounding_error > SWALLOWED), key=lambda f: -f.rounding_error)
    if not bad:
        return []
    cure = "--dtype float32 keeps it" + (", --rounding stochastic keeps its mean" if rounding == "nearest" else "")
    return [
        f"rounding to {dtype} spoils the change of {len(bad)} of {len(changed)} parameters: {bad[0].name} is off by "
        f"{bad[0].rounding_error:.0%} of its change; {cure}"
    ]


def _ratio(part: float, whole: float) -> float:
    return math.sqrt(part / whole) if whole else 0.0
