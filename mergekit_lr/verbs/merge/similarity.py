"""How the inputs of a merge relate, module by module, while they are at hand anyway: only where it is asked for.

Norms and inner products of the deltas are exact. Signs are counted on a sample of rows; shared directions and
interference are those of the leading ``DIRECTIONS`` singular triplets of a dense delta, and of all triplets of factors.
The figures and their sources are those of ``mergekit_lr.verbs.compare``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from lrgpu.random import stream
from lrgpu.truncated import truncated_svd
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.methods.delta import Delta, as_dense, gram, widened
from mergekit_lr.verbs.compare import (
    CompareReport,
    ModuleComparison,
    compare_factors,
    compare_triplets,
    opposite_signs,
    sampled_rows,
    short_names,
    summary,
)
from mergekit_lr.verbs.merge.layers import Job

DIRECTIONS = 16
TOLERANCE = 0.05  # of the error of those triplets: enough for a map


def deltas_of(job: Job, held: Sequence[Tensor], places: Mapping[int, int]) -> dict[int, Tensor]:
    """What each model changes of a tensor: from its inputs and the base behind them.

    places: ``id`` of a source to its number. Without a base nothing is a change.
    """
    if job.base is None:
        return {}
    base = widened(held[-1])
    return {
        places[id(item.source)]: widened(tensor) - base
        for item, tensor in zip(job.inputs, held, strict=False)
        if id(item.source) in places
    }


def compared(name: str, deltas: Mapping[int, Delta], *, seed: int) -> dict[str, Any]:
    """Figures for the journal. deltas: number of the input to its change (..., m, n), or a vector's (n,).

    Always ``tasks`` and ``norms``; of a matrix that two or more inputs change, all of a ``ModuleComparison``.
    """
    given = [delta if isinstance(delta, LowRank) else delta.reshape(-1, delta.shape[-1]) for delta in deltas.values()]
    norms = [math.sqrt(float(gram([delta]).sum())) for delta in given]
    kept = [(task, delta, norm) for task, delta, norm in zip(deltas, given, norms, strict=True) if norm > 0]
    tasks, changes = [task for task, _, _ in kept], [delta for _, delta, _ in kept]
    if len(tasks) < 2 or min(changes[0].shape[-2:]) < 2:
        return {"tasks": tasks, "norms": [norm for _, _, norm in kept]}
    factors = [delta for delta in changes if isinstance(delta, LowRank)]
    if len(factors) == len(changes):
        return asdict(compare_factors(name, tasks, factors, seed=seed))
    dense = [as_dense(delta).reshape(-1, delta.shape[-1]) for delta in changes]
    rows = sampled_rows(dense[0].shape[0], stream(seed, name, "signs")).to(dense[0].device)
    triplets = []
    for task, delta in zip(tasks, dense, strict=True):
        found = truncated_svd(delta, DIRECTIONS, tolerance=TOLERANCE, seeds=stream(seed, name, str(task)))
        some = found.S > found.S[0] * max(delta.shape) * torch.finfo(delta.dtype).eps
        triplets.append((found.U[:, some].cpu(), found.S[some].double().cpu(), found.Vh[some].mT.cpu()))
    signs = opposite_signs([delta[rows] for delta in dense]).cpu()
    return asdict(compare_triplets(name, tasks, triplets, signs, inner=gram(dense).cpu()))


def similarity(refs: Sequence[str], figures: Iterable[tuple[str, Mapping[str, Any] | None]]) -> CompareReport | None:
    """The comparison of the inputs ``refs``, from what the journal holds of each tensor; None where there is none."""
    modules, alone = [], {}
    squares = torch.zeros(len(refs), dtype=torch.float64)
    for name, found in figures:
        if found is None:
            continue
        for task, norm in zip(found["tasks"], found["norms"], strict=True):
            squares[task] += norm * norm
        if "inner" in found:
            modules.append(ModuleComparison(**found))
        elif len(found["tasks"]) == 1:
            alone[name] = found["tasks"][0]
    return summary(short_names(refs), squares.sqrt(), modules, alone) if modules else None
