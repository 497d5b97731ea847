"""The arithmetic of merging adapters: one part of one parameter at a time, in factors wherever all are factors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from lrgpu.random import stream
from lrgpu.rank import RankRule
from lrgpu.truncated import truncated_svd, truncated_svd_by_rule
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import as_matrix, from_matrix
from mergekit_lr.errors import FormatError, LrmergeError
from mergekit_lr.graph.journal import Journal
from mergekit_lr.graph.schedule import Batch
from mergekit_lr.methods.delta import Delta, as_dense, widened
from mergekit_lr.methods.merge_tensors import merge_tensors
from mergekit_lr.methods.opcm import Tally
from mergekit_lr.verbs.apply.change import squared
from mergekit_lr.verbs.convert.plan import HOLDS_ADDED
from mergekit_lr.verbs.merge.adapter_parts import Step
from mergekit_lr.verbs.merge.adapter_plan import AdapterPlan
from mergekit_lr.verbs.merge.adapter_rules import TRUNCATING, in_full
from mergekit_lr.verbs.merge.adapter_values import row_lengths
from mergekit_lr.verbs.merge.earlier import record


class Done(NamedTuple):
    """A finished step: factors A and B, or a tensor ``full``; and figures that JSON can hold.

    norm: squared norm of the merged change. lost: the part of it that truncation cut off. energy: the share that it was
    asked to keep, where it was cut by that.
    """

    tensors: dict[str, Tensor]
    figures: dict[str, Any]


@dataclass(frozen=True)
class AdapterMerging:
    """The stages of one run; ``write`` is called from one thread. dtype: what merged factors are rounded to, if at
    all: nothing where more arithmetic follows."""

    plan: AdapterPlan
    journal: Journal
    dtype: torch.dtype | None = None

    def read(self, batch: Batch) -> None:
        """Nothing: factors are mapped from their files, and what is computed is computed when its turn comes."""

    def compute(self, batch: Batch, _: None) -> list[Done]:
        """Every step of a batch."""
        return [self._step(node.work) for node in batch.nodes]

    def write(self, batch: Batch, done: list[Done]) -> None:
        """Put the results into the journal."""
        for node, one in zip(batch.nodes, done, strict=True):
            self.journal.add(node.name, one.tensors, one.figures)

    def _step(self, step: Step) -> Done:
        given = [one() if callable(one) else one for one in step.given]
        for source, one in zip(self.plan.adapters, given, strict=True):
            parts = (one.A, one.B) if isinstance(one, LowRank) else () if one is None else (one,)
            if not all(math.isfinite(float(part.sum(dtype=torch.float32))) for part in parts):
                raise FormatError(f"{source.ref}: {step.label} holds NaN or Inf; the adapter is damaged")
        tallies: list[Tally] = []
        stage = self._value if step.part in ("saved", "rows", "magnitude") else self._change
        done = stage(step, given, tallies)
        self._check_finite(step, done.figures["norm"])
        return done._replace(figures=done.figures | record(tallies))

    def _check_finite(self, step: Step, norm: float) -> None:
        if not math.isfinite(norm):
            name = self.plan.recipe.method.name
            raise FormatError(f"{step.label}: {name} gives NaN or Inf with {step.arguments}; choose other parameters")

    def _change(self, step: Step, given: list[Delta | None], tallies: list[Tally]) -> Done:
        """A difference: in factors, truncated where the recipe names a rank; or in full where it can stay so."""
        deltas = [step.zero() if one is None else one for one in given]
        name, arguments = self.plan.recipe.method.name, dict(step.arguments)
        rank, space = self.plan.recipe.document.output.rank, self.plan.recipe.document.space
        if name in TRUNCATING:
            own, name = arguments.pop("rank", None), TRUNCATING[name]
            arguments.pop("tolerance", None)
            rank = min((limit for limit in (own, rank) if limit is not None), default=None)
        if not all(isinstance(delta, LowRank) for delta in deltas):
            space = "full"
            name, arguments = in_full(self.plan.recipe.method, step.arguments)
        merged = self._merged(step, name, deltas, space, arguments, tallies)
        if len(step.size) < 2 or (isinstance(merged, Tensor) and rank is None and self._holds_full):
            full = as_dense(merged)
            own = full if len(step.size) < 2 or step.shape is None else from_matrix(full, step.kind, step.shape)
            return Done({"full": own.contiguous().cpu()}, {"norm": squared(full), "lost": 0.0})
        if isinstance(merged, Tensor):
            self._check_finite(step, squared(merged))  # before it goes into an SVD
        # Of a whole matrix only the factors that the energy asks for are ever formed; factors are cut together, later.
        energy = self.plan.recipe.document.output.energy if isinstance(merged, Tensor) else None
        cut = _factors(merged, rank, energy, stream(self.plan.seed, step.name, "truncation"))
        folded = cut.delta.folded().to(self.dtype)
        figures = {"norm": cut.norm, "lost": cut.lost} | ({"energy": energy} if energy is not None else {})
        return Done({"A": folded.A.cpu(), "B": folded.B.cpu()}, figures)

    def _value(self, step: Step, given: list[Any], tallies: list[Tally]) -> Done:
        """A value: the base's, changed by the merged differences from it; without a base the weighted mean."""
        stored = next((one.dtype for one in step.given if isinstance(one, Tensor)), torch.float32)
        values = [None if one is None else self._matrix(step, one) for one in given]
        if step.averaged:
            weights = step.arguments.get("weights", 1.0)
            if self.plan.recipe.method.continues:  # an earlier merge counts as the models that are in it
                already = step.earlier[0].count if step.earlier else 1
                weights = [already, *[1.0] * (len(values) - 1)]
                tallies.append(Tally(scale=1.0, mean_norm=0.0, count=already + len(values) - 1))
            merged = self._merged(step, "linear", values, "full", {"weights": weights}, [])
            change = merged
        else:
            origin = self._origin(step)
            deltas = [torch.zeros_like(origin) if one is None else widened(one) - origin for one in values]
            name, arguments = in_full(self.plan.recipe.method, step.arguments)
            change = as_dense(self._merged(step, name, deltas, "full", arguments, tallies))
            merged = origin.to(change.device) + change
        own = from_matrix(merged, step.kind, step.size) if step.part == "saved" else merged
        tensors = {"full": own.to(stored).contiguous().cpu()}
        return Done(tensors, {"norm": squared(change), "lost": 0.0})

    def _merged(
        self, step: Step, name: str, inputs: list[Any], space: Any, arguments: dict[str, Any], tallies: list[Tally]
    ) -> Any:
        """The merged inputs; of a method that can be continued with what is needed for that in ``tallies``."""
        device, method = self.plan.resources.device, self.plan.recipe.method
        provided = {"earlier": step.earlier, "tallies": tallies} if method.continues and name == method.name else {}
        try:
            return merge_tensors(
                name,
                [one.to(device=device) if isinstance(one, LowRank) else widened(one).to(device) for one in inputs],
                space=space,
                seed=self.plan.seed,
                name_of_tensor=step.label,
                **arguments,
                **provided,
            )
        except LrmergeError as error:
            raise type(error)(f"{step.label}: {error}") from None

    def _origin(self, step: Step) -> Tensor:
        """What the base has in the place of a value, in the form in which it is merged."""
        assert step.origin is not None
        assert self.plan.onto is not None
        base = self.plan.onto.read(step.origin)
        if step.part == "rows":
            return base[list(step.rows)].float()
        if step.part == "magnitude":
            return row_lengths(as_matrix(base, step.origin.kind)).reshape(step.size)
        return widened(self._matrix(step, base))

    def _matrix(self, step: Step, value: Tensor) -> Tensor:
        """A tensor in full in the layout of ``nn.Linear``; rows and lengths as they are."""
        return as_matrix(value, step.kind) if step.part == "saved" and value.ndim > 1 else value

    @property
    def _holds_full(self) -> bool:
        """Whether the result holds a difference in full, so that nothing of it need be cut off."""
        return not self.plan.truncated and (self.plan.kind == "model" or self.plan.to in HOLDS_ADDED)


class _Cut(NamedTuple):
    """Factors, the squared norm of the whole, and of what was cut off."""

    delta: LowRank
    norm: float
    lost: float


def _factors(merged: Delta, rank: int | None, energy: float | None, seed: int) -> _Cut:
    """Factors of at most ``rank``; of a matrix of the rank that keeps a share ``energy`` of its squared norm."""
    if isinstance(merged, LowRank):
        if rank is None or rank >= merged.rank:
            return _Cut(merged, float(merged.norm().square().sum()), 0.0)
        cut = merged.truncate(rank)
        lost = float(cut.residual.square().sum())
        # Columns of a balanced B have the squared length of their singular value.
        kept = float(cut.delta.B.double().square().sum(-2).square().sum())
        return _Cut(cut.delta, kept + lost, lost)
    side = min(merged.shape[-2:])
    if energy is not None:
        U, S, Vh = truncated_svd_by_rule(merged, RankRule(energy=energy, max_rank=rank), seeds=seed)[:3]
    elif rank is None or rank >= side:
        U, S, Vh = torch.linalg.svd(merged, full_matrices=False)
    else:
        U, S, Vh = truncated_svd(merged, rank, seeds=seed)[:3]
    root = S.clamp_min(0).sqrt()
    factors = LowRank(root[..., :, None] * Vh, U * root[..., None, :])
    # From the difference itself: norms subtracted would hide all errors below 1e-4.
    return _Cut(factors, squared(merged), squared(merged - factors.dense()))
