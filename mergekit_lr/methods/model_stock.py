"""Model Stock (arXiv 2403.19522): between the base and the average of fine-tunes, as far as their angles say.

With c the cosine between two fine-tunes seen from the base, the point of their span that is nearest to the centre
of the weights' distribution is t mean(W_t) + (1 - t) W_0 with t = N c / (1 + (N - 1) c).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from mergekit_lr.methods.blocks import products
from mergekit_lr.methods.delta import combine, gram, widened
from mergekit_lr.methods.registry import method


@method(
    "model_stock",
    paper="2403.19522",
    takes="weights",
    elementwise=lambda given: not given.get("filter_wise", False),
    measure=products,
    models=(2, None),
)
def model_stock(
    models: Sequence[Tensor],
    /,
    *,
    base: Tensor,
    filter_wise: bool = False,
    compat: Literal["paper", "mergekit"] = "paper",
    measured: Tensor | None = None,
) -> Tensor:
    """Model Stock: the average of the fine-tunes, drawn towards the base where they disagree.

    Formula:
        c = mean_(s != t) cos(delta_s, delta_t)
        ratio = T c / (1 + (T - 1) c)
        merged = W_0 + ratio * mean_t delta_t

    Args:
        models: N >= 2 fine-tunes (..., m, n).
        base: (..., m, n).
        filter_wise: a ratio for each row instead of one for the tensor.
        compat: the paper's ratio is within [0, 1], since its angles are at most right ones. "mergekit" takes the
            formula as it is: a negative cosine moves away from the base, without bound near -1 / (N - 1).

    Use when:
        Two or more fine-tunes of one task are averaged and no data is at hand to tune a scale: the angle
        between them sets it, tensor by tensor.

    Not when:
        The fine-tunes learnt different tasks: their deltas are near-orthogonal, the ratio near 0, and the
        result near the base.

    Cost:
        O(T^2 m n). The base is read as well.

    Example:
        {filter_wise: false}
    """
    deltas = [widened(model) - base for model in models]
    if filter_wise:
        rows = torch.stack(deltas, -2).double()
        inner = rows @ rows.mT  # (..., m, N, N)
    else:
        inner = gram(deltas) if measured is None else measured
    lengths = inner.diagonal(dim1=-2, dim2=-1).sqrt()
    size = lengths[..., :, None] * lengths[..., None, :]
    cosines = inner / size.where(size > 0, 1.0)
    count = len(models)
    off_diagonal = cosines.sum((-2, -1)) - cosines.diagonal(dim1=-2, dim2=-1).sum(-1)
    mean = off_diagonal / (count * (count - 1))
    if compat == "paper":
        mean = mean.clamp(0, 1)
    ratio = (count * mean / (1 + (count - 1) * mean))[..., None]
    ratio = ratio if filter_wise else ratio[..., None]
    average = combine([1 / count] * count, deltas)
    assert isinstance(average, Tensor)
    return base + ratio.to(average.dtype) * average
