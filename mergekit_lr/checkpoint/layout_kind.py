"""The kind of a parameter by the module that owns it, and whether PEFT's layer would compute what the module does.

A subclass may do more in its ``forward`` than the layer it derives from (a router that also scores, a position table
that shifts its indices). It is asked itself: a small copy must give what PEFT adds to.
"""

from __future__ import annotations

import copy
import math
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from mergekit_lr.checkpoint.parameter import Kind


class Owned(NamedTuple):
    """Kind, carrier and obstacle of a parameter, as ``Parameter`` has them."""

    kind: Kind
    carrier: str = ""
    obstacle: str = ""


def kind_of(owner: nn.Module, leaf: str, shape: tuple[int, ...]) -> Owned:
    """What the parameter ``leaf`` of shape ``shape`` is to the module ``owner``, which may be on the meta device."""
    if len(shape) < 2:
        return Owned(Kind.VECTOR)
    if leaf == "weight":
        match owner:
            case nn.Linear():
                return _owned(Kind.LINEAR, _is_linear(owner), "a linear layer with a forward of its own")
            case nn.Embedding():
                return _owned(Kind.EMBEDDING, _is_table(owner), "a table with a forward of its own")
            case nn.Conv1d() | nn.Conv2d() | nn.Conv3d():
                # PEFT copies kernel, stride and padding, and nothing else.
                plain = type(owner) in (nn.Conv1d, nn.Conv2d, nn.Conv3d) and owner.padding_mode == "zeros"
                plain = plain and owner.groups == 1 and set(owner.dilation) == {1}
                return _owned(Kind.CONVOLUTION, plain, "a convolution in groups, with dilation or padding of its own")
        if type(owner).__name__ == "Conv1D" and type(owner).__module__.startswith("transformers"):
            return Owned(Kind.TRANSPOSED, "module")
    experts = "expert" in type(owner).__name__.lower() or getattr(owner, "num_experts", None) == shape[0]
    if len(shape) == 3 and experts:
        # PEFT asks for this attribute, and only for it.
        transposed = getattr(owner, "is_transposed", False)
        return Owned(Kind.EXPERTS_TRANSPOSED if transposed else Kind.EXPERTS, "parameter")
    return Owned(Kind.OTHER)


def _owned(kind: Kind, plain: bool, obstacle: str) -> Owned:
    return Owned(kind, "module") if plain else Owned(kind, "", obstacle)


def _is_linear(owner: nn.Linear) -> bool:
    if type(owner).forward is nn.Linear.forward:
        return True
    weight, x = _numbers(5, 3), _numbers(2, 3)
    bias = None if owner.bias is None else _numbers(5)
    return _gives(owner, weight, bias, x, F.linear(x, weight, bias))


def _is_table(owner: nn.Embedding) -> bool:
    if type(owner).forward is nn.Embedding.forward:
        return True
    # One number that scales the table is the one thing more that PEFT knows of.
    scale = getattr(owner, "embed_scale", 1.0)
    if isinstance(scale, Tensor):
        if scale.numel() != 1:
            return False
        scale = 1.0  # as ``_gives`` sets it
    weight, indices = _numbers(5, 3), torch.tensor([[3, 1]])
    return _gives(owner, weight, None, indices, F.embedding(indices, weight) * scale)


def _numbers(*shape: int) -> Tensor:
    """Numbers without a pattern that leave the generators alone."""
    return torch.arange(1.0, 1 + math.prod(shape)).mul(1.7).sin().reshape(shape)


def _gives(owner: nn.Module, weight: Tensor, bias: Tensor | None, x: Tensor, expected: Tensor) -> bool:
    """Whether the forward of a copy with these parameters, and ones for its buffers, makes ``expected`` of ``x``."""
    probe = copy.copy(owner)
    probe._buffers = {name: None if b is None else torch.ones(b.shape) for name, b in owner._buffers.items()}
    probe._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
    try:
        with torch.no_grad():
            found = type(owner).forward(probe, x)
    except (RuntimeError, TypeError, ValueError, AttributeError, IndexError, NotImplementedError):
        return False  # it wants more than PEFT's layer would give it
    return isinstance(found, Tensor) and found.shape == expected.shape and torch.allclose(found, expected)
