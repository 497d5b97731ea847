"""An adapter: named low-rank deltas, and what else its file holds."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind


@dataclass(frozen=True)
class AdaptedWeight:
    """The change of one weight.

    kind: how the weight maps to the matrix that ``delta`` changes.
    delta: factors in the layout of ``nn.Linear``: A (r, d_in), B (d_out, r). A convolution's are flat, A
        (r, d_in / groups * kernel); an embedding's delta is of the transposed table, A (r, rows), B (width, r);
        experts' have a leading axis, one pair of factors per expert.
    shape: the weight's own shape in memory, where it is known; a convolution needs it for its kernel.
    bias: what is added to the layer's bias, before ``delta.scaling`` is applied to it (``lora_bias``).
    magnitude: DoRA's magnitude vector.
    """

    kind: Kind
    delta: LowRank
    shape: tuple[int, ...] | None = None
    bias: Tensor | None = None
    magnitude: Tensor | None = None


@dataclass(frozen=True)
class Adapter:
    """Everything that an adapter changes in its base.

    weights: full name of the parameter in memory (``model.layers.0.self_attn.q_proj.weight``) to its change, every end
        of a tie on its own.
    saved: full name in memory to a replacement in full. Of a module that ``config["modules_to_save"]`` names it
        stands in that place alone; else it goes into the base, and so into every end of a tie.
    token_rows: embedding parameter to (indices, rows), rows in full (``trainable_token_indices``).
    base: name or path of the base model, where it is known.
    config: fields of the source's configuration that the rest does not say, kept for the way back.
    metadata: string metadata of the source file (``ss_*``, ``modelspec.*``).
    added: full name in memory to a difference in full, in the parameter's own shape: changes of no low rank.
    """

    weights: dict[str, AdaptedWeight]
    saved: dict[str, Tensor] = field(default_factory=dict)
    token_rows: dict[str, tuple[list[int], Tensor]] = field(default_factory=dict)
    base: str | None = None
    config: dict[str, Any] = field(default_factory=dict)
    metadata: dict[str, str] = field(default_factory=dict)
    added: dict[str, Tensor] = field(default_factory=dict)
