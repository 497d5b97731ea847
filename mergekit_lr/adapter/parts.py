"""What an adapter file keeps for one module, whatever its dialect calls it, and the change that makes.

Dialects differ in how they name modules and in a handful of words for the same tensors; the tensors agree.
Here the words are gathered (:data:`WORDS`), a module's tensors become its change (:func:`change_of`), and a
change becomes tensors again (:func:`parts_of`).

A part is one of: A, B, mid (a convolution's core), alpha, bias, magnitude (DoRA), diff and diff_b (differences
in full), and LyCORIS' ``hada_*`` and ``lokr_*``.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from mergekit_lr.adapter.adapter import AdaptedWeight
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants import loha, lokr
from mergekit_lr.adapter.variants.site import wide
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, MismatchError

WORDS = {
    "lora_A.weight": "A",
    "lora_A.default.weight": "A",
    "lora_down.weight": "A",
    "lora.down.weight": "A",
    "lora_linear_layer.down.weight": "A",
    "lora_B.weight": "B",
    "lora_B.default.weight": "B",
    "lora_up.weight": "B",
    "lora.up.weight": "B",
    "lora_linear_layer.up.weight": "B",
    "lora_mid.weight": "mid",
    "lora_B.bias": "bias",
    "lora_magnitude_vector": "magnitude",
    "lora_magnitude_vector.weight": "magnitude",
    "dora_scale": "magnitude",
    "alpha": "alpha",
    "diff": "diff",
    "diff_b": "diff_b",
    "w_norm": "diff",
    "b_norm": "diff_b",
    **{name: name for name in (*loha.TENSORS, *lokr.TENSORS)},
}


class Change(NamedTuple):
    """What a file does to one module: a change of its weight in factors or in full, and of its bias in full."""

    weight: AdaptedWeight | None = None
    added: Tensor | None = None
    added_bias: Tensor | None = None


def split(key: str) -> tuple[str, str] | None:
    """(module, part) of a key, or None when its ending is no known word."""
    pieces = key.split(".")
    for count in (3, 2, 1):
        ending = ".".join(pieces[-count:])
        if len(pieces) > count and ending in WORDS:
            return ".".join(pieces[:-count]), WORDS[ending]
    return None


def by_module(tensors: Mapping[str, Tensor], where: str) -> dict[str, dict[str, Tensor]]:
    """All tensors of a file, by module and part.

    Raises:
        FormatError: keys that no adapter dialect has, or two keys for the same part.
    """
    unknown = [key for key in tensors if split(key) is None]
    if unknown:
        raise FormatError(f"{where}: {_some(unknown)} not understood: no adapter dialect has such tensors")
    modules: dict[str, dict[str, Tensor]] = {}
    for key, tensor in tensors.items():
        module, part = split(key) or ("", "")
        parts = modules.setdefault(module, {})
        if part in parts:
            raise FormatError(f"{where}: tensor {key} repeats what another tensor already says about {module}")
        parts[part] = tensor
    return modules


def change_of(module: str, parts: Mapping[str, Tensor], base: Parameter | None = None) -> Change:
    """The change that one module's tensors make.

    Args:
        module: For messages.
        parts: Part to tensor.
        base: The weight that is changed, where the base is known; it gives the kind and the shape, which LoHa and
            LoKr files leave open for convolutions.

    Raises:
        FormatError: parts are missing, or do not belong together.
        MismatchError: the change does not have the base's shape.
    """
    names = set(parts) - {"alpha", "magnitude", "bias", "diff_b"}
    in_full = names <= {"diff"} and not {"magnitude", "bias"} & set(parts)
    if (in_full and not {"diff", "diff_b"} & set(parts)) or ("diff" in names and not in_full):
        raise FormatError(f"{module}: holds {_listed(parts)}, which is not one adapter; the file mixes dialects")
    added_bias = wide(parts["diff_b"]) if "diff_b" in parts else None
    if in_full:
        return Change(added=_fitting(module, parts, base), added_bias=added_bias)
    delta, shape = _delta_of(module, parts, names)
    if base is not None:
        if tuple(delta.shape) != tuple(base.matrix_shape):
            raise _misfit(module, delta.shape, base)
        shape = base.shape
    if isinstance(delta, Tensor):
        if not {"magnitude", "bias"} & set(parts):
            return Change(added=delta.reshape(shape), added_bias=added_bias)
        # What belongs to factors needs factors to stand beside: the identity is one.
        delta = LowRank(torch.eye(delta.shape[1]), delta)
    kind = base.kind if base else Kind.LINEAR if len(shape) == 2 else Kind.CONVOLUTION
    magnitude = _magnitude(parts["magnitude"], shape) if "magnitude" in parts else None
    weight = AdaptedWeight(kind, delta, tuple(shape), bias=parts.get("bias"), magnitude=magnitude)
    return Change(weight, added_bias=added_bias)


def parts_of(weight: AdaptedWeight) -> dict[str, Tensor]:
    """A, B, alpha (and bias, magnitude) of a change, in a convolution's own axes; scaling becomes alpha.

    A keeps (r, d_in) or (r, channels, *kernel), B (d_out, r) or (d_out, r, 1, ...): as every dialect wants them.

    Raises:
        FormatError: a convolution whose kernel is not known.
    """
    delta = weight.delta
    A, B = delta.A, delta.B
    if weight.kind is Kind.CONVOLUTION:
        if weight.shape is None:
            raise FormatError("a convolution's factors cannot be written without its kernel: give the base model")
        kernel = weight.shape[2:]
        A = A.reshape(delta.rank, weight.shape[1], *kernel)
        B = B.reshape(*B.shape, *(1 for _ in kernel))
    parts = {"A": A.contiguous(), "B": B.contiguous(), "alpha": torch.tensor(float(delta.scaling * delta.rank))}
    if weight.bias is not None:
        parts["bias"] = weight.bias
    if weight.magnitude is not None:
        parts["magnitude"] = weight.magnitude
    return parts


def _delta_of(module: str, parts: Mapping[str, Tensor], names: set[str]) -> tuple[LowRank | Tensor, tuple[int, ...]]:
    """The change before any rescaling, as a matrix, and the shape of the weight as far as the parts tell."""
    if names <= {"A", "B", "mid"}:
        _require(module, parts, "A", "B")
        delta, kernel = _lora(module, parts)
    elif names <= loha.TENSORS:
        _require(module, parts, "hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b")
        delta = loha.product(parts, _scaling(parts, parts["hada_w1_b"].shape[0]), module)
        kernel = _kernel(parts, "hada_t1")
    elif names <= lokr.TENSORS:
        delta, kernel = _lokr(module, parts), _kernel(parts, "lokr_t2", "lokr_w2")
    else:
        raise FormatError(f"{module}: holds {_listed(parts)}, which is not one adapter; the file mixes dialects")
    d_out, d_in = delta.shape
    return delta, (d_out, d_in // math.prod(kernel), *kernel)


def _kernel(parts: Mapping[str, Tensor], *names: str) -> tuple[int, ...]:
    """Sides of a convolution's kernel: the last axes of the first of these parts that is there; () for none."""
    return next((tuple(parts[name].shape[2:]) for name in names if name in parts), ())


def _lokr(module: str, parts: Mapping[str, Tensor]) -> LowRank | Tensor:
    """Scaled as LyCORIS does: by the rank of a factored half, and not at all where both halves are full."""
    for i in "12":
        _require(module, parts, *([] if f"lokr_w{i}" in parts else [f"lokr_w{i}_a", f"lokr_w{i}_b"]))
    ranks = [parts[name].shape[0] for name in ("lokr_w2_b", "lokr_w1_b") if name in parts]
    return lokr.product(parts, _scaling(parts, ranks[0]) if ranks else 1.0, module)


def _lora(module: str, parts: Mapping[str, Tensor]) -> tuple[LowRank, tuple[int, ...]]:
    """Factors, flat, and the kernel. A convolution's kernel is in A, or in a core between A and B."""
    A, B, mid = parts["A"], parts["B"], parts.get("mid")
    kernel = tuple(A.shape[2:] if mid is None else mid.shape[2:])
    if A.ndim != B.ndim or any(n != 1 for n in B.shape[2:]) or (mid is not None and any(n != 1 for n in A.shape[2:])):
        raise FormatError(
            f"{module}: factors of shapes {list(A.shape)} and {list(B.shape)} are no LoRA: expected (r, d_in, *kernel) "
            "and (d_out, r, 1, ...)"
        )
    rank = A.shape[0]
    if mid is not None:
        A = torch.einsum("pq...,qi->pi...", wide(mid), wide(A).flatten(1))
    if A.shape[0] != B.shape[1]:
        raise FormatError(f"{module}: the factors have different ranks, {A.shape[0]} and {B.shape[1]}")
    return LowRank(A.flatten(1), B.flatten(1), _scaling(parts, rank)), kernel


def _scaling(parts: Mapping[str, Tensor], rank: int) -> float:
    """alpha / rank; a file without alpha means 1."""
    return float(parts["alpha"]) / rank if "alpha" in parts and rank else 1.0


def _magnitude(magnitude: Tensor, shape: tuple[int, ...]) -> Tensor:
    """(d_out,) lengths of rows, or (1, channels) lengths of input channels, as :mod:`variants.dora` reads them."""
    if magnitude.numel() == shape[0] and (magnitude.ndim == 1 or magnitude.shape[0] == shape[0]):
        return magnitude.flatten()
    if magnitude.ndim > 1 and magnitude.shape[:2] == (1, shape[0]) and shape[0] != shape[1]:
        return magnitude.flatten()  # PEFT gives a convolution's rows the second axis
    return magnitude.reshape(1, -1)


def _fitting(module: str, parts: Mapping[str, Tensor], base: Parameter | None) -> Tensor | None:
    """The difference of the weight in full, None where only the bias has one."""
    if "diff" not in parts:
        return None
    difference = wide(parts["diff"])
    if base is not None and tuple(difference.shape) != tuple(base.shape):
        raise _misfit(module, difference.shape, base)
    return difference


def _misfit(module: str, shape: Iterable[int], base: Parameter) -> MismatchError:
    return MismatchError(
        f"{module}: the adapter's change has shape {list(shape)}, the base's {base.name} {list(base.shape)}: this "
        "adapter belongs to another base"
    )


def _require(module: str, parts: Mapping[str, Tensor], *names: str) -> None:
    missing = [name for name in names if name not in parts]
    if missing:
        raise FormatError(f"{module}: the file has {_listed(parts)} but no {_listed(missing)}")


def _listed(names: Iterable[str]) -> str:
    return ", ".join(sorted(names))


def _some(keys: list[str], count: int = 3) -> str:
    """The first few of many keys, as the subject of a sentence."""
    more = f" and {len(keys) - count} more are" if len(keys) > count else " is" if len(keys) == 1 else " are"
    return f"tensor {', '.join(sorted(keys)[:count])}{more}"
