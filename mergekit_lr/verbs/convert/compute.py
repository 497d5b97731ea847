"""The arithmetic of conversion, one module at a time: factors as they are, or the truncated SVD of a change in full.

Matrices are (d_out, d_in), differences are formed in float32 and their norms in float64. A module costs O(r^2 (m + n))
where it is kept and O(m n r) where it is decomposed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import NamedTuple

import torch
from lrgpu.truncated import truncated_svd_by_rule
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.site import as_matrix
from mergekit_lr.errors import FormatError
from mergekit_lr.report.compression import ModuleChange
from mergekit_lr.verbs.convert.plan import ConvertPlan, Step, as_kind
from mergekit_lr.verbs.extract.compute import seed_of


class Done(NamedTuple):
    """What became of the parameter ``name``: its factors, or its tensor in full, and what is reported of it."""

    name: str
    weight: AdaptedWeight | None = None
    saved: Tensor | None = None
    change: ModuleChange | None = None


def converted(plan: ConvertPlan, step: Step) -> Iterator[Done]:
    """Do one step of the plan; one of PEFT's other types may change the bias of a module along with its weight.

    Raises:
        FormatError: a factor holds NaN or Inf. UsageError: the base is needed and was not given.
    """
    source = plan.source
    if step.action == "compute":
        assert source.variant is not None
        sites = tuple(site for site in source.variant.sites if f"{site.module}.weight" == step.name)
        for name, delta in replace(source.variant, sites=sites).deltas():
            yield _computed(plan, name, delta)
    elif step.action in ("copy", "fold"):
        weight = source.adapter.weights[step.name]
        _refuse_nan(step.name, weight)
        if step.action == "fold" and weight.magnitude is not None:
            yield _folded(plan, step.name, weight, weight.magnitude)
        else:
            yield _kept(step.name, weight, "kept")
    elif step.action in ("decompose", "add"):
        yield _difference(plan, step.name, source.adapter.added[step.name])


def _computed(plan: ConvertPlan, name: str, delta: LowRank | Tensor) -> Done:
    """A change that one of PEFT's other types makes."""
    parameter = plan.parameter(name)
    if isinstance(delta, LowRank):
        weight = AdaptedWeight(parameter.kind, delta, parameter.shape)
        return _kept(name, weight, "decomposed", "exactly of low rank")
    if delta.ndim == 1:
        return _added(plan, name, delta)
    return _decomposed(plan, name, delta, AdaptedWeight(parameter.kind, _nothing(delta), parameter.shape), "decomposed")


def _folded(plan: ConvertPlan, name: str, weight: AdaptedWeight, magnitude: Tensor) -> Done:
    """What a DoRA makes of the base's weight, as factors."""
    parameter, matrix = plan.weight(name)
    change = rescaled(as_matrix(matrix, parameter.kind), weight.delta, magnitude)
    bias = None if weight.bias is None else weight.bias * weight.delta.scaling
    weight = replace(weight, magnitude=None, bias=bias)
    if isinstance(change, LowRank):
        return _kept(name, replace(weight, delta=change.folded()), "folded", "its lengths are the base's")
    return _decomposed(plan, name, change, weight, "folded")


def _difference(plan: ConvertPlan, name: str, difference: Tensor) -> Done:
    if difference.ndim == 1:
        return _added(plan, name, difference)
    kind = as_kind(difference, plan.parameter(name) if plan.base else None)
    matrix = as_matrix(difference.float(), kind)
    weight = AdaptedWeight(kind, _nothing(matrix), tuple(difference.shape))
    return _decomposed(plan, name, matrix, weight, "decomposed")


def _added(plan: ConvertPlan, name: str, difference: Tensor) -> Done:
    """A vector's difference: PEFT holds the sum with the base's own."""
    _, vector = plan.weight(name)
    return Done(name, saved=(vector.float() + difference.float()).to(vector.dtype))


def _kept(name: str, weight: AdaptedWeight, state: str, reason: str = "") -> Done:
    delta = weight.delta
    stored = delta.A.numel() + delta.B.numel()
    norm = float(delta.norm().square().sum())
    shape = weight.shape or tuple(delta.shape)
    change = ModuleChange(name, str(weight.kind), shape, state, delta.rank, delta.rank, stored, stored, norm)
    return Done(name, weight, change=replace(change, reason=reason))


def _decomposed(plan: ConvertPlan, name: str, matrix: Tensor, weight: AdaptedWeight, state: str) -> Done:
    """The truncated SVD of ``matrix`` (d_out, d_in) in the place of what ``weight`` had."""
    before = weight.delta
    matrix = matrix.to(plan.resources.device)
    norm = float(matrix.double().square().sum())
    rank, error = 0, 0.0
    if norm > 0:
        svd = truncated_svd_by_rule(matrix, plan.rule, squared_norm=norm, seeds=seed_of(plan.seed, name))
        root, rank = svd.S.sqrt(), len(svd.S)
        A, B = (root[:, None] * svd.Vh).to(plan.stored).cpu(), (svd.U * root).to(plan.stored).cpu()
        weight = replace(weight, delta=LowRank(A, B))
        # From the difference itself: norms subtracted would hide all errors below 1e-4.
        error = float(torch.addmm(matrix, svd.U * svd.S, svd.Vh, alpha=-1).double().square().sum())
    change = ModuleChange(
        name=name,
        kind=str(weight.kind),
        shape=weight.shape or tuple(matrix.shape),
        state=state if rank else "dropped",
        rank_before=before.rank,
        rank=rank,
        stored_before=before.A.numel() + before.B.numel(),
        stored=rank * sum(matrix.shape),
        squared_norm=norm,
        squared_error=error,
        reason="" if rank else "its change is zero",
    )
    return Done(name, weight if rank else None, change=change)


def _nothing(matrix: Tensor) -> LowRank:
    """Factors of rank 0 in the shape of ``matrix``: what a change in full had of them before."""
    return LowRank(torch.empty(0, matrix.shape[1]), torch.empty(matrix.shape[0], 0))


def _refuse_nan(name: str, weight: AdaptedWeight) -> None:
    for which, factor in (("A", weight.delta.A), ("B", weight.delta.B)):
        if not bool(factor.sum(dtype=torch.float32).isfinite()):
            raise FormatError(f"{name}: factor {which} holds NaN or Inf; the adapter is damaged")
