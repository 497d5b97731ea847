"""One module of the base, and what an adapter keeps for it: all that a variant's mathematics may look at.

Everything here is in the layout of ``nn.Linear``: weights are matrices (d_out, d_in), a convolution's flat
behind its first axis, a GPT-2 ``Conv1D``'s and an embedding's transposed. So each variant is written once.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.errors import FormatError, UsageError


@dataclass(frozen=True)
class Site:
    """One module and its tensors.

    module: its path in memory. tensors: what follows the path in a key, to the tensor. config: the adapter's
    configuration. shape: (d_out, d_in) of the weight's matrix. order: index among the adapter's modules, in the
    model's order. shapes: (d_out, d_in) of every module of the adapter, which size the projections some variants
    share. shared: tensors of the adapter as a whole. base_weight, base_bias: read the base's weight as a
    matrix, and its bias.
    """

    module: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]
    shape: tuple[int, int]
    order: int = 0
    shapes: Sequence[tuple[int, int]] = ()
    shared: Mapping[str, Tensor] = field(default_factory=dict)
    base_weight: Callable[[], Tensor] | None = None
    base_bias: Callable[[], Tensor] | None = None

    def __getitem__(self, name: str) -> Tensor:
        """The tensor ``name`` in float32 (float64 stays), or an error that names what is missing."""
        return part(self.tensors, name, self.module)

    def whole(self, name: str) -> Tensor | None:
        """The tensor ``name`` of the adapter as a whole, or None when the file leaves it out."""
        return wide(self.shared[name]) if name in self.shared else None

    def weight(self) -> Tensor:
        """The base's weight (d_out, d_in) in float32; an error when no base was given."""
        if self.base_weight is None:
            kind = self.config.get("peft_type")
            raise UsageError(f"{self.module}: a {kind} adapter changes the base's own weight: give the base too")
        return wide(self.base_weight())

    def bias(self) -> Tensor | None:
        """The base's bias (d_out,) in float32, or None for a module without one."""
        return None if self.base_bias is None else wide(self.base_bias())

    def option(self, name: str, pattern: str | None = None, default: Any = None) -> Any:
        """A field of the configuration; an entry of the field ``pattern`` that matches the module wins."""
        value = self.config.get(name)
        table = self.config.get(pattern) if pattern else None
        return match(table or {}, self.module, default if value is None else value)


def part(tensors: Mapping[str, Tensor], name: str, module: str = "module") -> Tensor:
    """The tensor ``name`` of a module in the dtype of arithmetic, or an error that names what is missing."""
    if name not in tensors:
        raise FormatError(f"{module}: the adapter has no tensor {name} here, only {', '.join(sorted(tensors))}")
    return wide(tensors[name])


def match(table: Mapping[str, Any], module: str, default: Any) -> Any:
    """PEFT's pattern rule: the first key in the table's order that is the module or a suffix after a dot."""
    for key, value in table.items():
        if re.match(rf"(.*\.)?({key})$", module):
            return value
    return default


def wide(tensor: Tensor) -> Tensor:
    """``tensor`` in the dtype of arithmetic: float32, float64 where it is float64 already; integers as they are."""
    return tensor.float() if tensor.is_floating_point() and tensor.dtype != torch.float64 else tensor


def as_matrix(weight: Tensor, kind: Kind) -> Tensor:
    """A weight of ``kind`` as a matrix (d_out, d_in), or (experts, d_out, d_in); a vector as it is."""
    match kind:
        case Kind.TRANSPOSED | Kind.EMBEDDING | Kind.EXPERTS_TRANSPOSED:
            return weight.mT
        case Kind.CONVOLUTION:
            return weight.flatten(1)
        case _:
            return weight


def from_matrix(matrix: Tensor, kind: Kind, shape: Sequence[int]) -> Tensor:
    """The inverse of :func:`as_matrix`: a matrix in the weight's own layout and ``shape``."""
    transposed = kind in (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_TRANSPOSED)
    return (matrix.mT if transposed else matrix).reshape(tuple(shape))
