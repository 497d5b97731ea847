"""Which modules of a model a LoRA would miss, because the model's code does not call them as modules.

PEFT puts a LoRA behind a module's ``forward``. Code that takes the weight for itself
(``F.linear(x, self.dt_proj.weight)``) passes it by, and code that asks for an attribute that PEFT's layer does
not have (``self.conv1.stride``) fails. Both are seen in the source of the classes, with nothing run.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections.abc import Iterator
from functools import cache

from torch import nn

# Not part of a forward pass: building, initialising, loading, and the accessors of tables.
_ASIDE = (
    "__init__", "_init_", "init_", "reset_", "tie_", "resize_", "set_", "from_", "load_", "prune_", "fuse_",
    "get_input_", "get_output_",
)  # fmt: skip
# What PEFT's layers pass on from the layer that they wrap.
_PASSED_ON = {"weight", "bias", "in_features", "out_features", "training", "forward", "to"}
# Asking a weight for one of these takes nothing from it.
_HARMLESS = {"dtype", "device", "shape", "size", "ndim", "dim", "requires_grad", "is_cuda", "numel"}


def bypassed(model: nn.Module) -> dict[str, str]:
    """Path of every module whose weight or attributes other code reads directly, to where it does so.

    Example: ``{"layers.0.mixer.dt_proj": "MambaMixer reads dt_proj.weight itself"}``.
    """
    found: dict[str, str] = {}
    for path, module in model.named_modules():
        # The weight before the bias, as the better reason.
        for chain in sorted(_chains(type(module)), key=lambda chain: ("weight" not in chain, chain)):
            child, depth = module, 0
            while depth < len(chain) and (inner := child._modules.get(chain[depth])) is not None:
                child, depth = inner, depth + 1
            if 0 < depth < len(chain) and not _harmless(chain[depth:]) and child._parameters:
                target = ".".join(filter(None, (path, *chain[:depth])))
                found.setdefault(target, f"{type(module).__name__} reads {'.'.join(chain[: depth + 1])} itself")
    return found


def _harmless(rest: tuple[str, ...]) -> bool:
    if rest[0] in ("weight", "bias"):
        return len(rest) > 1 and (rest[1] in _HARMLESS or rest[1] == "")
    return rest[0] in _PASSED_ON


@cache
def _chains(kind: type[nn.Module]) -> frozenset[tuple[str, ...]]:
    """Attribute chains that start at ``self`` in the methods of a class: ``self.a.b.weight`` is (a, b, weight).

    A chain that is only tested (``is None``, ``isinstance``) ends in an empty name.
    """
    chains: set[tuple[str, ...]] = set()
    seen: set[str] = set()
    for owner in kind.__mro__:
        # The base classes of the libraries hold no computation of a model's own.
        if owner in (nn.Module, object) or owner.__name__ in ("PreTrainedModel", "ModelMixin"):
            continue
        for method in _methods(owner):
            if method.name not in seen and not method.name.startswith(_ASIDE):
                chains.update(_chains_of(method))
            seen.add(method.name)
    return frozenset(chains)


def _methods(owner: type) -> Iterator[ast.FunctionDef]:
    try:
        source = textwrap.dedent(inspect.getsource(owner))
    except (OSError, TypeError):  # written in C or made at run time: nothing to read
        return
    body = ast.parse(source).body[0]
    for node in body.body if isinstance(body, ast.ClassDef) else ():
        if isinstance(node, ast.FunctionDef):
            yield node


def _chains_of(method: ast.FunctionDef) -> Iterator[tuple[str, ...]]:
    parents = {child: node for node in ast.walk(method) for child in ast.iter_child_nodes(node)}
    for node in ast.walk(method):
        if not isinstance(node, ast.Attribute) or isinstance(parents.get(node), ast.Attribute):
            continue
        names: list[str] = []
        root: ast.expr = node
        while isinstance(root, ast.Attribute):
            names.append(root.attr)
            root = root.value
        if isinstance(root, ast.Name) and root.id == "self" and len(names) > 1:
            yield (*reversed(names), "") if _only_tested(node, parents[node]) else tuple(reversed(names))


def _only_tested(node: ast.Attribute, parent: ast.AST) -> bool:
    if isinstance(parent, ast.Compare):
        return all(isinstance(op, ast.Is | ast.IsNot) for op in parent.ops)
    return isinstance(parent, ast.Call) and isinstance(parent.func, ast.Name) and parent.func.id == "isinstance"
