"""Compare adapters of one base: do they point the same way, share directions, disagree in sign, interfere?

Everything comes from Gram matrices of the factors; no delta is ever formed. Only the share of entries with opposite
signs has no such form: it is counted on a sample of rows, which are formed one module at a time.

Per module, for tasks t and u with deltas D_t = U_t S_t V_t^T:

- cosine: <D_t, D_u> / (||D_t|| ||D_u||);
- overlap: ||U_t^T U_u||_F^2 / min(r_t, r_u), the mean squared cosine of principal angles, and the same of V;
- opposite signs: share of entries where D_t and D_u differ in sign, of those where both are non-zero;
- interference: ||(U^T U - I) S (V^T V - I)||_1 / sum(S) over the joint U, S, V of all tasks (singular task
  interference, arXiv 2412.00081, section 3), 0 for tasks in orthogonal directions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.open import open_adapter
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.verbs.extract.compute import seed_of

SAMPLED_ROWS = 256  # of each module, for the share of opposite signs
Matrix = tuple[tuple[float, ...], ...]
Triplets = tuple[Tensor, Tensor, Tensor]  # U (m, k), S (k) in float64, V (n, k)


@dataclass(frozen=True)
class ModuleComparison:
    """One module that at least two adapters change.

    tasks: indices of those adapters. norms: of their deltas. The matrices are (tasks, tasks), symmetric; ``output`` and
    ``input`` are the overlaps of left and right singular spaces. interference: one number for all of them together.
    """

    name: str
    tasks: tuple[int, ...]
    norms: tuple[float, ...]
    inner: Matrix
    output: Matrix
    input: Matrix
    opposite: Matrix
    interference: float


@dataclass(frozen=True)
class CompareReport:
    """Adapters against each other, in all and per module.

    names: of the adapters. norms: of each whole adapter. cosine: of the whole deltas. output, input, opposite: means
    over modules, weighted by the product of the two norms. alone: modules that only one adapter changes.
    """

    names: tuple[str, ...]
    norms: tuple[float, ...]
    cosine: Matrix
    output: Matrix
    input: Matrix
    opposite: Matrix
    interference: float
    modules: tuple[ModuleComparison, ...]
    alone: dict[str, int]
    hints: tuple[str, ...]

    def to_json(self) -> dict[str, Any]:
        """All figures, ready for JSON."""
        return asdict(self)


def compare(adapters: Sequence[str | Path | Adapter], *, seed: int = 0) -> CompareReport:
    """Compare two or more adapters of one base.

    Args:
        adapters: folders, files, Hub ids or adapters in memory.
        seed: of the sample of rows for signs.

    Raises:
        UsageError: fewer than two adapters.
        MismatchError: a module of two shapes, or no module in common.
    """
    if len(adapters) < 2:
        raise UsageError(f"compare needs two adapters or more, got {len(adapters)}")
    opened = [a if isinstance(a, Adapter) else open_adapter(a).adapter for a in adapters]
    names = short_names([f"adapter {i + 1}" if isinstance(a, Adapter) else str(a) for i, a in enumerate(adapters)])
    where: dict[str, list[int]] = {}
    for index, adapter in enumerate(opened):
        for name in adapter.weights:
            where.setdefault(name, []).append(index)
    modules = []
    for name, tasks in where.items():
        if len(tasks) > 1:
            deltas = [opened[t].weights[name].delta for t in tasks]
            _check_shapes(name, deltas, [names[t] for t in tasks])
            modules.append(compare_factors(name, tasks, deltas, seed=seed))
    if not modules:
        raise MismatchError(f"{names[0]} and {names[1]} have no module in common: are they of the same base?")
    norms = torch.zeros(len(opened), dtype=torch.float64)
    for index, adapter in enumerate(opened):
        for weight in adapter.weights.values():
            norms[index] += float(weight.delta.norm().square().sum())
    report = summary(names, norms.sqrt(), modules, {n: t[0] for n, t in where.items() if len(t) == 1})
    return replace(report, hints=(*report.hints, *_hint_on_ranks(opened)))


def compare_factors(name: str, tasks: Sequence[int], deltas: Sequence[LowRank], *, seed: int = 0) -> ModuleComparison:
    """One module of several tasks, whose deltas (..., m, n) are factors."""
    flat = [d if d.A.dim() == 2 else _block_diagonal(d) for d in deltas]
    rows = sampled_rows(flat[0].shape[-2], seed_of(seed, name))
    signs = opposite_signs([LowRank(d.A, d.B[rows], d.scaling).dense() for d in flat])
    return compare_triplets(name, tasks, [_decomposed(delta) for delta in flat], signs)


def compare_triplets(
    name: str, tasks: Sequence[int], triplets: Sequence[Triplets], opposite: Tensor, *, inner: Tensor | None = None
) -> ModuleComparison:
    """One module from the singular triplets of each task.

    opposite: the shares of opposite signs, (tasks, tasks). inner: the inner products of the deltas, (tasks, tasks);
    without it those of the triplets, which are the same where these are all there are.
    """
    u, s, v = zip(*triplets, strict=True)
    # Two Grams of the joint bases hold everything but the signs.
    left, right, values = _gram(u), _gram(v), torch.cat(s)
    ranks = [len(part) for part in s]
    member = torch.block_diag(*(torch.ones(1, rank) for rank in ranks)).double()  # (tasks, all ranks)
    inner = member @ ((values[:, None] * left) * (right * values)) @ member.mT if inner is None else inner
    least = torch.minimum(*torch.meshgrid(member.sum(1), member.sum(1), indexing="ij")).clamp_min(1)
    identity = torch.eye(len(values), dtype=torch.float64)
    crossed = (((left - identity) * values) @ (right - identity)).abs().sum()
    return ModuleComparison(
        name,
        tuple(tasks),
        tuple(inner.diagonal().clamp_min(0).sqrt().tolist()),
        _tuples(inner),
        _tuples(member @ left.square() @ member.mT / least),
        _tuples(member @ right.square() @ member.mT / least),
        _tuples(opposite),
        float(crossed / values.sum()) if float(values.sum()) else 0.0,
    )


def _block_diagonal(delta: LowRank) -> LowRank:
    """A stack (e, d_out, d_in) of experts as one factored matrix (e d_out, e d_in) of the same norms and products."""
    folded = delta.folded()
    return LowRank(torch.block_diag(*folded.A), torch.block_diag(*folded.B))


def _decomposed(delta: LowRank) -> tuple[Tensor, Tensor, Tensor]:
    """U (m, k), S (k) and V (n, k), directions of rounding noise left out; S in float64."""
    u, s, vh = delta.svd()
    kept = int((s > s[:1] * max(delta.shape) * torch.finfo(torch.float32).eps).sum()) if s.numel() else 0
    return u[:, :kept], s[:kept].double(), vh[:kept].mT


def _gram(bases: Sequence[Tensor]) -> Tensor:
    """Inner products of all columns of all bases, float64 from float32 products."""
    joint = torch.cat(tuple(bases), dim=1)
    return (joint.mT @ joint).double()


def sampled_rows(count: int, seed: int) -> Tensor:
    """Which rows of ``count`` are looked at for signs."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(seed))[:SAMPLED_ROWS].sort().values


def opposite_signs(deltas: Sequence[Tensor]) -> Tensor:
    """Share of entries with opposite signs, of those where both are non-zero, (tasks, tasks)."""
    signs = torch.stack([delta.sign().reshape(-1) for delta in deltas])
    both = signs.abs() @ signs.abs().mT
    return torch.where(both > 0, (both - signs @ signs.mT) / (2 * both.clamp_min(1)), 0.0).double()


def summary(
    names: tuple[str, ...], norms: Tensor, modules: Sequence[ModuleComparison], alone: dict[str, int]
) -> CompareReport:
    """The comparison as a whole, from its modules; norms: of each task's whole change, (tasks), float64."""
    count = len(names)
    inner, weight = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, count, dtype=torch.float64)
    sums = {key: torch.zeros(count, count, dtype=torch.float64) for key in ("output", "input", "opposite")}
    interference = total = 0.0
    for module in modules:
        index = torch.tensor(module.tasks)
        grid = (index[:, None], index[None, :])
        own = torch.tensor(module.norms, dtype=torch.float64)
        inner[grid] += torch.tensor(module.inner, dtype=torch.float64)
        weight[grid] += own[:, None] * own[None, :]
        for key, held in sums.items():
            held[grid] += torch.tensor(getattr(module, key), dtype=torch.float64) * own[:, None] * own[None, :]
        squares = float(own.square().sum())
        interference, total = interference + module.interference * squares, total + squares
    product = norms[:, None] * norms[None, :]
    cosine = torch.where(product > 0, inner / product.clamp_min(1e-300), 0.0)
    cosine.fill_diagonal_(1.0)
    means = {key: torch.where(weight > 0, held / weight.clamp_min(1e-300), 0.0) for key, held in sums.items()}
    matrices = {key: _tuples(value) for key, value in means.items()}
    interference = interference / total if total else 0.0
    hints = _hints(cosine, means, norms, interference)
    return CompareReport(
        names, tuple(norms.tolist()), _tuples(cosine), **matrices, interference=interference,
        modules=tuple(modules), alone=alone, hints=tuple(hints),
    )  # fmt: skip


def _hints(cosine: Tensor, means: dict[str, Tensor], norms: Tensor, interference: float) -> list[str]:
    """What the figures suggest for a merge; thresholds are rules of thumb."""
    off = ~torch.eye(len(norms), dtype=torch.bool)
    hints = []
    if float(cosine[off].abs().max()) < 0.15:
        hints.append("near-orthogonal deltas: a plain sum keeps the norm of each")
    if float(cosine[off].min()) < -0.1:
        hints.append("some tasks oppose each other (negative cosine): expect losses whichever method merges them")
    if float(means["opposite"][off].max()) > 0.45 and float(cosine[off].abs().max()) >= 0.15:
        hints.append("heavy sign conflict: methods that elect signs (ties, dare_ties) may help")
    if interference > 1:
        hints.append("tasks share singular directions: whitening them (tsv_m, or iso_c in core space) may help")
    if float(norms.max()) > 3 * float(norms.min().clamp_min(1e-300)):
        hints.append("norms differ more than threefold: give weights, or the largest task drowns the others")
    return hints


def _hint_on_ranks(adapters: Sequence[Adapter]) -> list[str]:
    """Adapters of different ranks have no common factors to average."""
    ranks = [max(weight.delta.rank for weight in adapter.weights.values()) for adapter in adapters if adapter.weights]
    if min(ranks) == max(ranks):
        return []
    return [f"ranks differ ({min(ranks)} to {max(ranks)}): merge in core space, or by cat with output.rank"]


def short_names(refs: Sequence[str]) -> tuple[str, ...]:
    """A short name each: the last part of its path, made unique."""
    short = [Path(ref).name for ref in refs]
    return tuple(name if short.count(name) == 1 else ref for name, ref in zip(short, refs, strict=True))


def _check_shapes(name: str, deltas: list[LowRank], names: list[str]) -> None:
    for delta, other in zip(deltas[1:], names[1:], strict=True):
        if delta.shape != deltas[0].shape:
            raise MismatchError(
                f"{name} is {list(deltas[0].shape)} in {names[0]} and {list(delta.shape)} in {other}: adapters of "
                "different bases cannot be compared"
            )


def _tuples(matrix: Tensor) -> Matrix:
    return tuple(tuple(row) for row in matrix.tolist())
