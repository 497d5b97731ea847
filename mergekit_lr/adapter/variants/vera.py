"""VeRA (arXiv 2310.11454): delta = diag(b) B diag(d) A with A and B shared by all modules and frozen.

The shared pair is as large as the largest module and sliced; a file without it holds the seed it was drawn
with. PVeRA keeps a mean and a log-variance in each half of d and A: merged, it acts through the mean alone.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants.site import Site

TENSORS = frozenset({"vera_lambda_b", "vera_lambda_d", "pvera_lambda_b", "pvera_lambda_d"})


def delta_of(site: Site) -> LowRank:
    """vera_lambda_b (d_out,), vera_lambda_d (r,), and over all modules vera_A (r, n), vera_B (m, r).

    In PVeRA, lambda_d and A have 2 r entries and rows.
    """
    name = "pvera" if site.config["peft_type"] == "PVERA" else "vera"
    A, B = projections(site, name)
    d_out, d_in = site.shape
    b, d = site[f"{name}_lambda_b"], site[f"{name}_lambda_d"]
    if name == "pvera":
        A, d = A[: len(A) // 2], d[: len(d) // 2]
    return LowRank(d[:, None] * A[:, :d_in], b[:, None] * B[:d_out])


def projections(site: Site, name: str) -> tuple[Tensor, Tensor]:
    """The shared A and B, from the file or drawn again from ``projection_prng_key`` as PEFT draws them."""
    A, B = site.whole(f"{name}_A"), site.whole(f"{name}_B")
    if A is not None and B is not None:
        return A, B
    rank = site.config["r"]
    d_out, d_in = (max(sizes) for sizes in zip(*site.shapes, strict=True))
    generator = torch.Generator().manual_seed(site.config["projection_prng_key"])
    rows = 2 * rank if name == "pvera" else rank
    return _kaiming(rows, d_in, generator), _kaiming(d_out, rank, generator)


def _kaiming(rows: int, columns: int, generator: torch.Generator) -> Tensor:
    bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(columns))
    return torch.empty(rows, columns).uniform_(-bound, bound, generator=generator)
