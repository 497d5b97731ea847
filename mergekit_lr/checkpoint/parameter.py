"""What a weight is: its kind, its name in the running model, and the tensors on disk that make it up.

A *parameter* is one entry of the model in memory (``model.layers.0.mlp.experts.gate_up_proj``). On disk it
may be one tensor, or several (one per expert and projection), under other names. Linear algebra sees it as
a stack of matrices in the layout of ``nn.Linear``, (d_out, d_in), whatever its own layout is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import Enum


class Kind(str, Enum):
    """How a weight maps to a matrix of shape (d_out, d_in)."""

    LINEAR = "linear"  # (d_out, d_in), itself
    TRANSPOSED = "transposed"  # GPT-2 Conv1D: (d_in, d_out)
    CONVOLUTION = "convolution"  # (d_out, d_in / groups, *kernel), flattened behind the first axis
    EMBEDDING = "embedding"  # (rows, width), transposed: LoRA writes the delta as (B A)^T
    EXPERTS = "experts"  # (experts, d_out, d_in): one matrix per expert
    EXPERTS_TRANSPOSED = "experts_transposed"  # (experts, d_in, d_out)
    VECTOR = "vector"  # norms and biases: no matrix
    OTHER = "other"  # any other parameter: no LoRA layer exists for it

    def __str__(self) -> str:
        return self.value

    @property
    def turned(self) -> bool:
        """Whether the weight in its own layout is the transpose of the matrix (d_out, d_in)."""
        return self in (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_TRANSPOSED)


@dataclass(frozen=True)
class Block:
    """A tensor on disk or a part of it: the whole or a part of one matrix.

    index: the slice ``tensor[index]`` (one expert of a stack), or None for the whole tensor.
    rows: of that, the rows ``start:stop`` of the first axis (a fused qkv cut in three), or None for all.
    """

    tensor: str
    index: int | None = None
    rows: tuple[int, int] | None = None


@dataclass(frozen=True)
class Parameter:
    """One parameter of the model in memory.

    name: full name in memory, ``model.layers.0.self_attn.q_proj.weight``.
    shape: shape in memory.
    blocks: for each matrix of the stack (one, or one per expert) the blocks that make it up, joined along
        ``join`` (an axis of the single matrix in the parameter's own layout, before any transposition).
    carrier: how PEFT can hold a low-rank change of it: ``"module"`` (a LoRA on its module),
        ``"parameter"`` (a LoRA on the parameter itself, ``target_parameters``), or empty: not at all.
    obstacle: why a weight of a kind that could have a LoRA has none, for the report; else empty.
    """

    name: str
    kind: Kind
    shape: tuple[int, ...]
    blocks: tuple[tuple[Block, ...], ...]
    join: int = 0
    carrier: str = ""
    obstacle: str = ""

    @property
    def module(self) -> str:
        """Path of the module that owns it: the name without its last part."""
        return self.name.rpartition(".")[0]

    @property
    def matrices(self) -> int:
        """How many matrices the stack has: 1, or the number of experts."""
        return len(self.blocks)

    @property
    def matrix_shape(self) -> tuple[int, int]:
        """(d_out, d_in) of one matrix as a linear layer sees it; (1, n) for a vector."""
        shape = self.shape
        match self.kind:
            case Kind.LINEAR:
                return shape[0], shape[1]
            case Kind.TRANSPOSED | Kind.EMBEDDING:
                return shape[1], shape[0]
            case Kind.CONVOLUTION:
                return shape[0], math.prod(shape[1:])
            case Kind.EXPERTS:
                return shape[1], shape[2]
            case Kind.EXPERTS_TRANSPOSED:
                return shape[2], shape[1]
            case _:
                return 1, math.prod(shape)
