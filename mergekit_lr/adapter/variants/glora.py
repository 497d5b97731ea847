"""GLoRA (arXiv 2306.07967): W' = W + W * A + B elementwise, b' = b + b * D + E + W C; needs the base.

Each of A to E is a low-rank product (Xd, Xu), a vector or a number (X), or absent (zeros).
"""

from __future__ import annotations

from torch import Tensor

from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({f"glora_{path}.{part}" for path in "ABCDE" for part in ("Xd", "Xu", "X", "zeros")})


def delta_of(site: Site) -> Tensor:
    """(d_out, d_in), dense: the Hadamard product with W has no low rank."""
    return site.weight() * _path(site, "A") + _path(site, "B")


def bias_delta_of(site: Site) -> Tensor | None:
    """The change of the bias (d_out,), None where there is none."""
    bias = site.bias()
    if bias is None:
        return None
    C = _path(site, "C")
    through = site.weight() @ C.reshape(-1) if isinstance(C, Tensor) else 0.0
    return bias * _path(site, "D") + _path(site, "E") + through


def _path(site: Site, name: str) -> Tensor | float:
    prefix = f"glora_{name}"
    if f"{prefix}.Xd" in site.tensors:
        return site[f"{prefix}.Xd"] @ site[f"{prefix}.Xu"]
    return site[f"{prefix}.X"] if f"{prefix}.X" in site.tensors else 0.0
