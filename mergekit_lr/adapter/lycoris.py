"""The LyCORIS dialect: kohya's names, and more than LoRA behind them.

LoCon (a core, ``lora_mid``, between the factors), LoHa (``hada_*``), LoKr (``lokr_*``), differences in full
(``diff``, ``diff_b``, ``w_norm``, ``b_norm``) and DoRA (``dora_scale``) are read. What has low rank becomes factors
exactly, the rest stays a difference in full. Written are LoCon factors, differences and DoRA scales, which
says all of it again. Source: LyCORIS, arXiv 2309.14859.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.adapter.file import Source, read_file, with_hashes, write_file
from mergekit_lr.adapter.kohya import network_facts, read_underscored, refuse_leftovers, underscored
from mergekit_lr.adapter.parts import parts_of
from mergekit_lr.checkpoint.parameter import Parameter
from mergekit_lr.errors import UsageError

_NAMES = {"A": "lora_down.weight", "B": "lora_up.weight", "alpha": "alpha", "magnitude": "dora_scale"}


def open_lycoris(
    source: Source, *, metadata: Mapping[str, str] | None = None, base: Mapping[str, Parameter] | None = None
) -> Adapter:
    """Read a LyCORIS file; arguments and errors as in :func:`~mergekit_lr.adapter.kohya.open_kohya`.

    A LoHa or LoKr without a core does not say the shape of a convolution's kernel: give ``base`` for those.
    """
    tensors, found, where = read_file(source, metadata)
    return read_underscored(tensors, found, where, base)


def save_lycoris(adapter: Adapter, path: str | Path) -> None:
    """Write factors as LoCon, differences as ``diff`` and ``diff_b``, DoRA magnitudes as ``dora_scale``.

    Raises:
        UsageError: the adapter holds what the dialect has no place for.
    """
    refuse_leftovers(adapter, "LyCORIS", keep=("added",))
    tensors: dict[str, Tensor] = {}
    for name, difference in adapter.added.items():
        tensors[f"{underscored(name)}.{'diff_b' if name.endswith('.bias') else 'diff'}"] = difference
    for name, weight in adapter.weights.items():
        module, parts = underscored(name), parts_of(weight)
        if "magnitude" in parts:
            parts["magnitude"] = _scale_axes(parts["magnitude"], parts["A"].ndim)
        bias = parts.pop("bias", None)
        if bias is not None and f"{module}.diff_b" in tensors:
            raise UsageError(f"{name}: has a bias of its own and a difference of the bias; LyCORIS has room for one")
        if bias is not None:
            tensors[f"{module}.diff_b"] = bias * weight.delta.scaling
        tensors |= {f"{module}.{_NAMES[part]}": tensor for part, tensor in parts.items()}
    facts = {"ss_network_module": "lycoris.kohya"} | network_facts(adapter)
    write_file(path, tensors, with_hashes(tensors, facts))


def _scale_axes(magnitude: Tensor, axes: int) -> Tensor:
    """``dora_scale`` as LyCORIS shapes it: (d_out, 1, ...) for rows, (1, channels, 1, ...) for input channels."""
    lead = magnitude.shape if magnitude.ndim == 2 else (len(magnitude), 1)
    return magnitude.reshape(*lead, *(1 for _ in range(axes - 2))).contiguous()
