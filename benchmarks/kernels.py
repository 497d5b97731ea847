"""What the kernels of floor 1 cost, as ratios: truncated SVD, delta formation, SVD of a product.

    OMP_NUM_THREADS=1 python benchmarks/kernels.py                 # 1024 and 2048, about two minutes
    OMP_NUM_THREADS=1 python benchmarks/kernels.py 1024 2048 4096  # with dense SVDs of 4096, much longer

Times are process CPU times, the least of a few runs. "floor" is the time of the products with D that the
truncated SVD itself makes, and nothing else. "excess" is ||D - D_k|| over the least possible, minus one.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from typing import Any

import torch
from lrgpu.elementwise import delta
from lrgpu.factored import svd_of_product
from lrgpu.truncated import truncated_svd
from torch import Tensor


def seconds(run: Callable[[], Any], repeats: int = 5) -> float:
    """The least CPU time of a few runs, without the first if there are several."""
    times = []
    for _ in range(repeats + (repeats > 1)):
        start = time.process_time()
        run()
        times.append(time.process_time() - start)
    return min(times[1:] or times)


def spectra(n: int) -> dict[str, Tensor]:
    """The four kinds of delta, n x n, float32."""
    generator = torch.Generator().manual_seed(0)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=generator)

    U, V = torch.linalg.qr(normal(n, n))[0], torch.linalg.qr(normal(n, n))[0]
    i = torch.arange(1, n + 1)
    flat = normal(n, 32) @ normal(32, n)
    W = (0.02 * normal(n, n)).bfloat16().float()
    lora = normal(n, 16) @ normal(16, n)
    return {
        "i^-1": (U * i**-1.0) @ V.T,
        "i^-0.5": (U * i**-0.5) @ V.T,
        "rank 32 + flat": flat / flat.norm() + 0.5 * normal(n, n) / n,
        "LoRA in bf16": (W + 0.01 * W.norm() / lora.norm() * lora).bfloat16().float() - W,
    }


def svds(n: int, rank: int) -> None:
    """Truncated SVD against the dense one, torch.svd_lowrank and its own products."""
    print(f"\ntruncated SVD, {n} x {n}, rank {rank}, milliseconds and excess in %")
    print(f"{'spectrum':>15} {'ours':>8} {'excess':>7} {'passes':>6} {'floor':>8} {'ours/floor':>10}", end="")
    print(f" {'lowrank':>8} {'excess':>7} {'lowrank/ours':>12} {'dense':>9} {'dense/ours':>10}")
    for name, D in spectra(n).items():
        squared_norm = float((D.double() ** 2).sum())
        kept: list[Tensor] = []
        dense = seconds(lambda D=D, kept=kept: kept.append(torch.linalg.svd(D, full_matrices=False)[1]), 1)
        best = float((kept[0][rank:].double() ** 2).sum()) ** 0.5

        def excess(U: Tensor, S: Tensor, Vh: Tensor, D: Tensor = D, best: float = best) -> float:
            return 100 * (float((D - (U * S) @ Vh).double().norm()) / best - 1)

        result = truncated_svd(D, rank, squared_norm=squared_norm)
        ours = seconds(lambda D=D, T=squared_norm: truncated_svd(D, rank, squared_norm=T))
        block = torch.randn(n, max(16, -(-rank // 16) * 8))
        floor = result.passes / 2 * seconds(lambda D=D, block=block: (D @ block, block.T @ D))
        U, S, V = torch.svd_lowrank(D, q=rank + 8, niter=2)
        lowrank = seconds(lambda D=D: torch.svd_lowrank(D, q=rank + 8, niter=2))
        print(
            f"{name:>15} {1e3 * ours:8.1f} {excess(*result[:3]):7.3f} {result.passes:6d} {1e3 * floor:8.1f} "
            f"{ours / floor:10.2f} {1e3 * lowrank:8.1f} {excess(U[:, :rank], S[:rank], V[:, :rank].T):7.3f} "
            f"{lowrank / ours:12.2f} {1e3 * dense:9.0f} {dense / ours:10.1f}"
        )


def deltas(n: int) -> None:
    """Delta with its norm against the plain expression."""
    print(f"\ndelta and its norm, {n} x {n}, milliseconds")
    print(f"{'dtype':>15} {'ours':>8} {'naive':>8} {'naive/ours':>10} {'GB/s':>6}")
    out = torch.empty(n, n)
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        a, b = torch.randn(n, n).to(dtype), torch.randn(n, n).to(dtype)

        def naive(a: Tensor = a, b: Tensor = b) -> tuple[Tensor, Tensor]:
            difference = a.float() - b.float()
            return difference, (difference * difference).sum()

        ours = seconds(lambda a=a, b=b: delta(a, b, out=out))
        plain = seconds(naive)
        moved = (2 * dtype.itemsize + 4) * n * n / 1e9
        name = str(dtype).removeprefix("torch.")
        print(f"{name:>15} {1e3 * ours:8.1f} {1e3 * plain:8.1f} {plain / ours:10.1f} {moved / ours:6.1f}")


def products(n: int, r: int, rank: int) -> None:
    """SVD of a product of factors against the dense SVD of the product, and its own thin products."""
    B, A = torch.randn(n, r), torch.randn(r, n)
    X, Y = torch.randn(r, rank), torch.randn(rank, r)
    ours = seconds(lambda: svd_of_product(B, A, rank=rank))
    floor = seconds(lambda: (B.T @ B, A @ A.T, B @ X, Y @ A))
    dense = seconds(lambda: torch.linalg.svd(B @ A, full_matrices=False), 1)
    print(
        f"{n:>7} {r:>4} {rank:>4} {1e3 * ours:8.2f} {1e3 * floor:8.2f} {ours / floor:10.2f} "
        f"{1e3 * dense:9.0f} {dense / ours:10.0f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("sizes", nargs="*", type=int, default=[1024, 2048])
    parser.add_argument("--rank", type=int, default=64)
    options = parser.parse_args()
    sizes, rank = options.sizes, options.rank
    print(f"torch {torch.__version__}, {torch.get_num_threads()} thread(s)")
    for n in sizes:
        svds(n, rank)
    for n in sizes:
        deltas(n)
    print("\nSVD of B @ A, milliseconds")
    print(f"{'n':>7} {'r':>4} {'rank':>4} {'ours':>8} {'floor':>8} {'ours/floor':>10} {'dense':>9} {'dense/ours':>10}")
    for n in sizes:
        for r, k in ((16, 8), (64, 16)):
            products(n, r, k)


if __name__ == "__main__":
    main()
