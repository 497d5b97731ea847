"""Orthogonal projection-based continual merging, OPCM (arXiv 2501.09522): one model after the other, state in and out.

With tau = U S V^T what is merged so far and k the leading directions that make up a share alpha of sum(S), a new
delta loses its part in the leading k x k block and along every u_i v_i^T:

    delta - U_k (U_k^T delta V_k) V_k^T - sum_{i > k} (u_i^T delta v_i) u_i v_i^T,

which leaves it orthogonal to tau. Then the whole model is scaled to the mean norm of the task vectors so far.
Memory is one model, however many are merged; of factors everything stays factors, of growing rank.

A merge does not show by what it was scaled. Whoever wants another model to join it later keeps a ``Tally`` beside it.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.errors import MismatchError, UsageError
from mergekit_lr.methods.delta import Delta, combine, squared_norm, stacked, triplets, unstacked, widened
from mergekit_lr.methods.registry import method


class Tally(NamedTuple):
    """What must be known of a merged matrix, beside it, for another model to join.

    scale, mean_norm, count: as of :class:`Continual`, of this matrix alone.
    """

    scale: float
    mean_norm: float
    count: int


@dataclass(frozen=True)
class Continual:
    """What has been merged so far.

    deltas: by name. scale: lambda, by which the next step multiplies them. mean_norm: of the task vectors, over
    the whole model. count: how many they were.
    """

    deltas: Mapping[str, Delta]
    scale: float
    mean_norm: float
    count: int


def begin(update: Mapping[str, Delta]) -> Continual:
    """The state after the first model, which is taken as it is."""
    return Continual(dict(update), 1.0, _norm(update), 1)


def merge_next(
    state: Continual, update: Mapping[str, Delta], *, alpha: float = 0.5, matrices: Collection[str] | None = None
) -> Continual:
    """The state with one more model merged.

    Args:
        state: from :func:`begin` or an earlier call.
        update: the model's deltas, by the same names.
        alpha: the share of the nuclear norm whose directions are protected.
        matrices: names of the deltas that are projected; all with two axes without it. Others are added whole.

    Raises:
        MismatchError: ``update`` has other names than the state.
    """
    if update.keys() != state.deltas.keys():
        other = sorted(update.keys() ^ state.deltas.keys())[0]
        raise MismatchError(f"opcm: {other!r} is in one of the models only; all must have the same tensors")
    raw: dict[str, Delta] = {}
    for name, merged in state.deltas.items():
        delta = update[name]
        projects = len(delta.shape) == 2 if matrices is None else name in matrices
        raw[name] = combine([state.scale, 1], [merged, project(delta, merged, alpha=alpha) if projects else delta])
    mean_norm = (state.mean_norm * state.count + _norm(update)) / (state.count + 1)
    size = _norm(raw)
    scale = size / mean_norm if mean_norm > 0 and size > 0 else 1.0
    return Continual({name: combine([1 / scale], [d]) for name, d in raw.items()}, scale, mean_norm, state.count + 1)


def project(delta: Delta, merged: Delta, *, alpha: float) -> Delta:
    """The delta (..., m, n) without its part along what is merged already.

    Args:
        delta: the new one.
        merged: tau; its directions at the level of rounding do not count.
        alpha: k is the number of leading singular values whose cumulative share of the nuclear norm is at most this.

    Raises:
        UsageError: ``alpha`` is not between 0 and 1.
    """
    if not 0 <= alpha <= 1:
        raise UsageError(f"opcm: 'alpha' must be from 0 to 1, got {alpha:g}")
    U, S, Vh = triplets(merged)
    total = S.sum(-1, keepdim=True)
    share = S.cumsum(-1) / total.where(total > 0, 1)
    leading = ((share <= alpha) if alpha < 1 else torch.ones_like(share, dtype=torch.bool)).to(S.dtype)
    if isinstance(delta, LowRank):
        folded = delta.folded()
        inside = (U.mT @ folded.B) @ (folded.A @ Vh.mT)
    else:
        inside = U.mT @ widened(delta) @ Vh.mT  # (..., rho, rho)
    removed = inside * (leading[..., :, None] * leading[..., None, :])
    diagonal = inside.diagonal(dim1=-2, dim2=-1) * (1 - leading)
    removed = removed + torch.diag_embed(diagonal)
    if isinstance(delta, LowRank):
        return combine([1, -1], [delta, LowRank(Vh, U @ removed)])
    return widened(delta) - U @ removed @ Vh


def running_sum(
    deltas: Sequence[Delta],
    /,
    *,
    continued: bool = False,
    earlier: Sequence[Tally] = (),
    tallies: list[Tally] | None = None,
    **_: Any,
) -> Delta:
    """The same without projection, for vectors."""
    return _merged(deltas, 0.5, (), earlier if continued else None, tallies)


@method("opcm", paper="2501.09522", takes="deltas", vectors=running_sum, factored=True, spectral=True)
def opcm(
    deltas: Sequence[Delta],
    /,
    *,
    alpha: float = 0.5,
    continued: bool = False,
    earlier: Sequence[Tally] = (),
    tallies: list[Tally] | None = None,
) -> Delta:
    """Merges one model after the other, each without its part along those before. Vectors are added whole.

    Here the norm that is kept is the tensor's own. :func:`begin` and :func:`merge_next` do the same for a whole model,
    where the norm is the model's, as in the paper. With ``continued`` a model joins an earlier merge as if it had been
    there from the start, without the models that are in it already.

    Formula:
        tau = U S V^T, what is merged so far
        delta_t' = delta_t - U_k U_k^T delta_t V_k V_k^T - sum_(i > k) u_i u_i^T delta_t v_i v_i^T
        tau <- (lambda tau + delta_t') / lambda'

    Args:
        deltas: T tensors (..., m, n), or T ``LowRank``, in the order in which they are merged.
        alpha: the share of the nuclear norm whose directions are protected.
        continued: the first model is an earlier merge by opcm, which the others join; the lrmerge.json beside it says
            how many models are in it and how they were scaled.
        earlier: that of each matrix of the first input, where ``continued``; or one for all.
        tallies: a list that gets the same of each matrix of the result.

    Use when:
        Models come one after the other and earlier ones are no longer at hand.

    Not when:
        All models are there at once and their order should not matter: tsv_m or iso_c.

    Cost:
        An SVD of what is merged for each further model. Adapters stay factors, and their ranks add up.

    Example:
        {alpha: 0.5}
    """
    return _merged(deltas, alpha, ("",), earlier if continued else None, tallies)


def _merged(
    deltas: Sequence[Delta],
    alpha: float,
    matrices: Collection[str],
    earlier: Sequence[Tally] | None,
    tallies: list[Tally] | None,
) -> Delta:
    batched = len(deltas[0].shape) > 2  # each matrix has a norm of its own
    batch = unstacked(deltas) if batched else [deltas]
    starts = [None] * len(batch) if earlier is None else list(earlier) * (len(batch) if len(earlier) == 1 else 1)
    if len(starts) != len(batch):
        raise UsageError(
            f"opcm: 'continued' needs a tally in 'earlier' for each of the {len(batch)} matrices of the first model, "
            f"got {len(earlier or ())}"
        )
    merged = []
    for (first, *others), start in zip(batch, starts, strict=True):
        state = begin({"": first}) if start is None else Continual({"": first}, *start)
        for delta in others:
            state = merge_next(state, {"": delta}, alpha=alpha, matrices=matrices)
        merged.append(state.deltas[""])
        if tallies is not None:
            tallies.append(Tally(state.scale, state.mean_norm, state.count))
    return stacked(merged, deltas[0]) if batched else merged[0]


def _norm(deltas: Mapping[str, Delta]) -> float:
    total = sum(float(squared_norm(d if isinstance(d, LowRank) else _matrix(d)).sum()) for d in deltas.values())
    return max(total, 0.0) ** 0.5


def _matrix(tensor: Tensor) -> Tensor:
    return tensor.reshape(1, -1) if tensor.ndim < 2 else tensor
