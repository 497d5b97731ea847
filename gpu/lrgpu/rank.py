"""How many singular values to keep: by count, energy, error or noise floor, and one budget for many matrices.

With singular values s_1 >= s_2 >= ... of a matrix D, rank k keeps the energy sum_{i<=k} s_i^2 of ||D||^2 and
leaves the squared error sum_{i>k} s_i^2, the least possible (Eckart-Young-Mirsky). Comparisons with a target
are inclusive and guarded against round-off.
"""

from __future__ import annotations

import heapq
import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import torch

from lrgpu.backend import Array

_ROUND_OFF = 1e-12  # relative slack of an inclusive comparison of float64 sums
_FLOAT32_EPS = 2.0**-23
_ROUNDING_RMS = 0.212  # rms rounding error of normal numbers over eps * their rms, measured, any format


@dataclass(frozen=True)
class RankRule:
    """A target for the rank of one matrix. The rank is the least that meets every target given.

    count: this many. energy: at least this share of ||D||^2, in [0, 1]. error: at most this relative
    Frobenius error ||D - D_k|| / ||D||. floor: keep only singular values above this (a cap, not a target;
    alone it keeps all of them). multiple_of: round the rank up to a multiple. max_rank: never more.
    energy=1 and error=0 mean the numerical rank; count at or above the full rank means the full rank.
    """

    count: int | None = None
    energy: float | None = None
    error: float | None = None
    floor: float | None = None
    multiple_of: int = 1
    max_rank: int | None = None

    def __post_init__(self) -> None:
        if self.count is None and self.energy is None and self.error is None and self.floor is None:
            raise ValueError("a rank rule needs one of count, energy, error, floor")
        if self.count is not None and self.count < 0:
            raise ValueError(f"count must be 0 or more, got {self.count}")
        if self.energy is not None and not 0 <= self.energy <= 1:
            raise ValueError(f"energy must be between 0 and 1, got {self.energy}")
        if self.error is not None and not 0 <= self.error <= 1:
            raise ValueError(f"error must be between 0 and 1, got {self.error}")
        if self.floor is not None and not self.floor >= 0:
            raise ValueError(f"floor must be 0 or more, got {self.floor}")
        if self.multiple_of < 1:
            raise ValueError(f"multiple_of must be 1 or more, got {self.multiple_of}")
        if self.max_rank is not None and self.max_rank < 1:
            raise ValueError(f"max_rank must be 1 or more, got {self.max_rank}")

    def choose(self, singular_values: Sequence[float] | Array, squared_norm: float, full_rank: int) -> int | None:
        """The rank for a matrix of which the leading singular values are known.

        Args:
            singular_values: descending; all ``full_rank`` of them, or only the leading ones.
            squared_norm: ||D||^2.
            full_rank: min(m, n).

        Returns:
            The rank, 0 for a zero matrix, or None if more singular values are needed to decide.
        """
        values = [float(s) for s in _as_list(singular_values)][:full_rank]
        if squared_norm <= 0 or (values and values[0] <= 0):
            return 0
        limit = full_rank if self.max_rank is None else min(self.max_rank, full_rank)
        rank = self._wanted(values, float(squared_norm), full_rank)
        if rank is None:
            return limit if len(values) >= limit else None
        rank = -(-rank // self.multiple_of) * self.multiple_of
        return min(rank, limit)

    def _wanted(self, values: list[float], squared_norm: float, full_rank: int) -> int | None:
        """The least rank that meets the targets and the floor, before rounding and limits."""
        demands: list[int | None] = [] if self.count is None else [min(self.count, full_rank)]
        targets = self._tail_targets(squared_norm)
        demands += [_rank_for_tail(values, target, squared_norm, full_rank) for target in targets]
        demanded = max((d for d in demands if d is not None), default=full_rank)
        if self.floor is None:
            return None if None in demands else demanded
        above = _count_above(values, self.floor, full_rank)
        known = [d for d in (None if None in demands else demanded, above) if d is not None]
        # What is unknown is at least len(values), so it only matters to a minimum beyond that.
        if len(known) == 2 or (known and known[0] <= len(values)):
            return min(known)
        return None

    def _tail_targets(self, squared_norm: float) -> list[float]:
        """The largest squared errors that the energy and error targets allow; 0 where they allow none."""
        shares = [] if self.energy is None else [1.0 - self.energy]
        shares += [] if self.error is None else [self.error**2]
        return [(share + _ROUND_OFF) * squared_norm if share > 0 else 0.0 for share in shares]


def _as_list(values: Any) -> list[float]:
    return values.tolist() if hasattr(values, "tolist") else list(values)


def _rank_for_tail(values: list[float], target: float, squared_norm: float, full_rank: int) -> int | None:
    """The least k with sum_{i>k} s_i^2 <= target, or the numerical rank for a target of 0; None if unknown."""
    if target <= 0:
        return _count_above(values, full_rank * _FLOAT32_EPS * values[0], full_rank) if values else None
    captured = [0.0, *accumulate(s * s for s in values)]
    if len(values) == full_rank:  # then the tail is known term by term, without cancellation
        tails = [0.0, *accumulate(s * s for s in reversed(values))][::-1]
    else:
        tails = [squared_norm - c for c in captured]
    return next((k for k, tail in enumerate(tails) if tail <= target), None)


def _count_above(values: list[float], threshold: float, full_rank: int) -> int | None:
    """How many singular values are greater than the threshold; None if all known ones are, of more."""
    above = next((k for k, s in enumerate(values) if s <= threshold), None)
    return full_rank if above is None and len(values) == full_rank else above


def noise_floor(weight_rms: float, shape: tuple[int, int], dtype: torch.dtype) -> float:
    """The largest singular value that rounding the weights to ``dtype`` alone puts into a delta.

    Rounding errors are independent with rms 0.212 eps rms(W), so their matrix has a Marchenko-Pastur
    spectrum that ends at that rms times sqrt(m) + sqrt(n): for bfloat16 1.66e-3 rms(W) (sqrt(m) + sqrt(n)).

    Args:
        weight_rms: root mean square of the weights.
        shape: (m, n) of the matrix.
        dtype: what the weights were stored in.
    """
    rows, columns = shape
    return _ROUNDING_RMS * torch.finfo(dtype).eps * weight_rms * (math.sqrt(rows) + math.sqrt(columns))


def allocate(
    spectra: Sequence[Sequence[float] | Array],
    costs: Sequence[float],
    budget: float,
    *,
    max_rank: int | None = None,
    multiple_of: int = 1,
) -> list[int]:
    """Ranks of many matrices under one budget, such that together they capture the most energy.

    Greedy by energy gained per unit of cost. The gains of one matrix fall with its rank, so the greedy
    choice is the best one for what it spends. Cost O(N log M) for N values of M matrices.

    Args:
        spectra: for each matrix its leading singular values, descending. Zeros are never bought.
        costs: for each matrix what one unit of rank costs (stored numbers, or bytes).
        budget: the most that all may cost together.
        max_rank: the most for any single matrix.
        multiple_of: ranks are multiples of this, or all the values that a spectrum has.

    Returns:
        One rank per matrix; 0 is possible.

    Raises:
        ValueError: lengths differ, or a cost is not positive.
    """
    if len(spectra) != len(costs):
        raise ValueError(f"{len(spectra)} spectra but {len(costs)} costs")
    if not all(cost > 0 for cost in costs):
        raise ValueError("every cost must be positive")

    energies = [[float(s) ** 2 for s in _as_list(values)][:max_rank] for values in spectra]
    ranks = [0] * len(spectra)

    def offer(i: int) -> tuple[float, int, int] | None:
        """The next group of ranks of matrix i: (-gain per cost, matrix, group size)."""
        group = energies[i][ranks[i] : ranks[i] + multiple_of]
        gain = sum(group)
        return (-gain / (costs[i] * len(group)), i, len(group)) if gain > 0 else None

    heap = [entry for i in range(len(spectra)) if (entry := offer(i))]
    heapq.heapify(heap)
    left = budget
    while heap:
        _, i, size = heapq.heappop(heap)
        if costs[i] * size > left:
            continue  # this matrix is done; a cheaper one may still fit
        left -= costs[i] * size
        ranks[i] += size
        if entry := offer(i):
            heapq.heappush(heap, entry)
    return ranks
