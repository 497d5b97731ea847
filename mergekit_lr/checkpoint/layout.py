"""From a checkpoint's headers and config: every parameter of the model in memory, and the tensors that make it.

An adapter speaks of modules by their names in memory. Those often differ from the names on disk (a prefix
added, one tensor per expert stacked into one parameter, a fused projection cut in three), and which parameter
can have a LoRA at all depends on the module that owns it. Three ways lead there, in this order:

1. the plain decoder layout, recognised by names and shapes alone, where both names agree (no import, < 1 ms);
2. the model's own code: built by transformers or diffusers on the meta device, without a byte of weights;
3. names and shapes alone, for what nobody's code describes.

``Layout.source`` says which one it was.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

import torch

from mergekit_lr.checkpoint.architecture import Unbuildable, from_diffusers, from_transformers
from mergekit_lr.checkpoint.layout_shapes import from_shapes, is_plain_decoder
from mergekit_lr.checkpoint.parameter import Parameter

Headers = Mapping[str, tuple[torch.dtype, tuple[int, ...]]]


@dataclass(frozen=True)
class Layout:
    """The model in memory, as far as its checkpoint fills it.

    parameters: in module order; their blocks and ``unused`` together name every tensor on disk.
    tied: the other ends of ties: parameters that no tensor fills because they share another's memory.
    ties: name of each of ``tied`` to the name of the parameter it shares.
    unused: tensor on disk to the reason why no parameter takes it.
    missing: names in memory that the checkpoint leaves to their initial values.
    source: how all this is known: "plain decoder names", "transformers", "diffusers" or "shapes ...".
    """

    parameters: tuple[Parameter, ...]
    tied: tuple[Parameter, ...] = ()
    ties: dict[str, str] = field(default_factory=dict)
    unused: dict[str, str] = field(default_factory=dict)
    missing: tuple[str, ...] = ()
    source: str = ""

    @cached_property
    def by_name(self) -> dict[str, Parameter]:
        """Every parameter, tied ends included, by its name in memory."""
        return {parameter.name: parameter for parameter in (*self.parameters, *self.tied)}

    @cached_property
    def modules(self) -> frozenset[str]:
        """Paths of all modules that hold a parameter, directly or further down; the model itself is ""."""
        paths = {""}
        for name in (*self.by_name, *self.missing):
            while "." in name:
                name = name.rpartition(".")[0]
                paths.add(name)
        return frozenset(paths)

    def ends(self, name: str) -> tuple[Parameter, ...]:
        """The parameter and, where it is the source of a tie, the other ends."""
        others = (end for end in self.tied if self.ties[end.name] == name) if name in self._sources else ()
        return (self.by_name[name], *others)

    @cached_property
    def _sources(self) -> frozenset[str]:
        return frozenset(self.ties.values())


def parameters(tensors: Headers, config: dict[str, Any] | None) -> Layout:
    """The layout of a checkpoint, from what its headers and its config say.

    Args:
        tensors: Name on disk to (dtype, shape); wrapper prefixes such as ``_orig_mod.`` already removed.
        config: Content of its ``config.json``, or None where it has none.

    Returns:
        The layout. Custom code that a config may name is never loaded; such a model is read by its shapes.
    """
    config = config or {}
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    if is_plain_decoder(shapes, config):
        return Layout(source="plain decoder names", **from_shapes(shapes, config))
    reason = "the config names no architecture"
    try:
        if config.get("model_type"):
            reason = "transformers is not installed"
            if find_spec("transformers"):
                return Layout(source="transformers", **from_transformers(shapes, config))
        elif config.get("_class_name"):
            reason = "diffusers is not installed"
            if find_spec("diffusers"):
                return Layout(source="diffusers", **from_diffusers(shapes, config))
    except Unbuildable as problem:
        reason = str(problem)
    return Layout(source=f"shapes ({reason})", **from_shapes(shapes, config))
