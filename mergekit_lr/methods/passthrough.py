"""One model's tensor as it is, or scaled."""

from __future__ import annotations

from collections.abc import Sequence

from mergekit_lr.methods.delta import Delta, scaled
from mergekit_lr.methods.registry import PerModel, method


@method("passthrough", paper="mergekit", takes="weights", factored=True, models=(1, 1))
def passthrough(models: Sequence[Delta], /, *, scale: PerModel = 1.0) -> Delta:
    """A copy of the only model, times ``scale``."""
    return scaled(models[0], scale[0])
