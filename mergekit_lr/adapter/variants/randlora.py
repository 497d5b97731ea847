"""RandLoRA (arXiv 2502.00987): a full-rank sum of scaled random low-rank products, so a dense delta.

delta = s * sum_i B_i diag(lambda_i) A diag(gamma_i) on a matrix with its shorter side as the input side,
transposed back for a tall one; A and B_i are shared by all modules, sliced, and drawn from a seed when the
file leaves them out.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_lr.adapter.variants.site import Site
from mergekit_lr.errors import FormatError

TENSORS = frozenset({"randlora_lambda", "randlora_gamma", "randlora_A", "randlora_B"})


def delta_of(site: Site) -> Tensor:
    """randlora_lambda (r, n), randlora_gamma (n, min side); shared A (r, 1, min), B (max, n, r)."""
    short, long = min(site.shape), max(site.shape)
    A, B = _bases(site)
    scales, gains = site["randlora_lambda"], site["randlora_gamma"]
    count = scales.shape[1]
    right = (scales[:, :, None] * A[:, :, :short] * gains[None]).flatten(0, 1)  # (r n, short), rank-major
    left = B[:long, :count].flatten(1)  # (long, n r), basis-major
    scale = site.config["randlora_alpha"] / site.config["r"]
    product = (left @ right) * scale
    return product if short == site.shape[1] else product.T


def _bases(site: Site) -> tuple[Tensor, Tensor]:
    A, B = site.whole("randlora_A"), site.whole("randlora_B")
    if A is not None and B is not None:
        return A, B
    config = site.config
    if config.get("sparse") or config.get("very_sparse"):
        raise FormatError(f"{site.module}: sparse RandLoRA bases are not in the file: save with save_projection")
    d_out, d_in = (max(sizes) for sizes in zip(*site.shapes, strict=True))
    short, long, rank = min(d_out, d_in), max(d_out, d_in), config["r"]
    generator = torch.Generator().manual_seed(config["projection_prng_key"])
    # PEFT draws the bases in half precision: which one depends on the machine it runs on.
    dtype = torch.bfloat16
    A = _draw((rank, 1, short), generator, dtype)
    parts = [_draw((long, 1, rank), generator, dtype) for _ in range(math.ceil(short / rank))]
    B = torch.cat(parts, dim=1)
    return (A / A.std()).float(), (B / B.std()).float()


def _draw(shape: tuple[int, ...], generator: torch.Generator, dtype: torch.dtype) -> Tensor:
    tensor = torch.empty(shape, dtype=dtype)
    return torch.nn.init.kaiming_uniform_(tensor, a=math.sqrt(5), generator=generator)
