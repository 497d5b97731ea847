"""The parts of adapters that meet in a merge: a step for each part that any adapter holds of a parameter.

The parts, and what stands in for an adapter that leaves a parameter alone:

- ``change``: a difference of the weight, as factors (d_out, d_in) or in full. None is a difference of zero.
- ``bias``: what a LoRA layer adds to its bias (``lora_bias``), a difference likewise.
- ``saved``: a replacement in full (``modules_to_save``, biases), in the parameter's own shape.
- ``rows``: replaced rows of a table (``trainable_token_indices``), for all rows that any adapter trained.
- ``magnitude``: DoRA's lengths of rows.

The last three are values and no differences. With the base they are merged as differences from what it has there,
so an adapter that lacks one counts as the base's. Without the base their weighted mean is taken (methods.md 4.5), for
which every adapter needs one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import MismatchError
from mergekit_lr.methods.delta import Delta
from mergekit_lr.methods.opcm import Tally
from mergekit_lr.verbs.adapter_source import Base
from mergekit_lr.verbs.merge.adapter_sources import Made, Opened, parameter_of

PartName: TypeAlias = Literal["change", "bias", "saved", "rows", "magnitude"]
Given: TypeAlias = LowRank | Tensor | Made | None


@dataclass(frozen=True, eq=False)
class Step:
    """One part of one parameter.

    name: of the parameter. kind, shape: of its weight, the shape where it is known. size: of what is merged, (..., m,
    n) for a matrix in the layout of ``nn.Linear``, (n,) for a vector. given: by each adapter; None where it has none.
    arguments: of the method. origin: the base's parameter that a value replaces. rows: of a table. earlier: how each
    matrix of the first adapter came about, where the recipe continues a merge.
    """

    name: str
    part: PartName
    kind: Kind
    shape: tuple[int, ...] | None
    size: tuple[int, ...]
    given: tuple[Given, ...]
    arguments: dict[str, Any]
    origin: Parameter | None = None
    rows: tuple[int, ...] = ()
    earlier: tuple[Tally, ...] = ()

    @property
    def label(self) -> str:
        """Its name in the journal and the report."""
        return self.name if self.part == "change" else f"{self.name} ({self.part})"

    @property
    def factored(self) -> bool:
        """Whether all that is given are factors."""
        return self.part == "change" and all(one is None or isinstance(one, LowRank) for one in self.given)

    @property
    def averaged(self) -> bool:
        """Whether the values are averaged, for want of a base that they could differ from."""
        return self.part in ("saved", "rows", "magnitude") and self.origin is None

    def zero(self) -> Delta:
        """The difference that stands for None."""
        if len(self.size) < 2:
            return torch.zeros(self.size)
        *lead, m, n = self.size
        return LowRank(torch.zeros(*lead, 0, n), torch.zeros(*lead, m, 0))


def known_parameter(opened: Sequence[Opened], base: Base | None, name: str) -> Parameter | None:
    """The base's parameter of this name; None without a base, and for what the base leaves to chance."""
    found = parameter_of(base, name)
    if base is None or found is not None or name in base.layout.missing or name in base.checkpoint.tensors:
        return found
    ref = next(one.ref for one in opened if name in (*one.changed, *one.adapter.saved, *one.adapter.token_rows))
    raise MismatchError(f"{ref}: changes {name}, which the base_model does not have; is it of another?")


def check_sizes(opened: Sequence[Opened], given: Sequence[Given], size: tuple[int, ...], name: str) -> None:
    """Raise where adapters have a part of different sizes."""
    for one, own in zip(opened, given, strict=True):
        if isinstance(own, LowRank | Tensor) and tuple(own.shape) != size:
            raise MismatchError(
                f"{name} has a change of shape {list(own.shape)} in {one.ref} and {list(size)} in another adapter: "
                "they are of different bases"
            )
