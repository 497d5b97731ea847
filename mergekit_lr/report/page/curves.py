"""Energy against rank: how much of a change the first r singular directions hold.

For one module it is sum(s_1^2 ... s_r^2) / ||delta||^2; for many, sums over sums, each cut to rank r. Where fewer than
r singular values are known (an adapter of lower rank) those that are known count, so a curve ends flat: it is what the
result would keep if no module had a rank above r.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import accumulate
from typing import NamedTuple

from mergekit_lr.report.page.content import Cell
from mergekit_lr.report.page.places import kinds_of

ALL = "all"


class Curve(NamedTuple):
    """Energies at ranks; layer is ``ALL`` for a kind over all layers."""

    layer: str
    kind: str
    squared_norm: float
    points: tuple[tuple[int, float], ...]

    def at(self, rank: int) -> float | None:
        """The energy at a rank that was looked at."""
        return dict(self.points).get(rank)


def curves_of(cells: Sequence[Cell]) -> list[Curve]:
    """A curve for each kind over all layers, then one for each cell; none where no singular values are known."""
    known = [cell for cell in cells if cell.squared_norm and any(m.singular_values for m in cell.modules)]
    grid = ranks(max((len(m.singular_values) for cell in known for m in cell.modules), default=0))
    kinds = kinds_of(cell.place for cell in known)
    groups = [(ALL, kind, [cell for cell in known if cell.place.kind == kind]) for kind in kinds]
    groups += [(cell.place.layer, cell.place.kind, [cell]) for cell in known]
    return [
        Curve(layer, kind, sum(c.squared_norm for c in group), _points(group, grid)) for layer, kind, group in groups
    ]


def ranks(most: int) -> list[int]:
    """Ranks to look at: powers of two, the middles between them, and the largest rank itself."""
    powers = [1 << i for i in range(most.bit_length())]
    return sorted({rank for power in powers for rank in (power, 3 * power // 2) if rank <= most} | ({most} - {0}))


def _points(cells: Iterable[Cell], grid: Sequence[int]) -> tuple[tuple[int, float], ...]:
    modules = [module for cell in cells for module in cell.modules]
    total, longest = sum(m.squared_norm for m in modules), max(len(m.singular_values) for m in modules)
    sums = [list(accumulate((s * s for s in m.singular_values), initial=0.0)) for m in modules]
    return tuple(
        (rank, min(sum(known[min(rank, len(known) - 1)] for known in sums) / total, 1.0))
        for rank in grid
        if rank <= longest or rank == _next(grid, longest)
    )


def _next(grid: Sequence[int], longest: int) -> int:
    """The last rank of a curve: the first of the grid that is not below its longest spectrum."""
    return next(rank for rank in grid if rank >= longest)
