"""Leading eigenvectors against all of them in float64, and from threads that share one LAPACK."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch
from lrgpu import eigen
from lrgpu.eigen import every, leading
from torch import Tensor


def gram(kind: str, n: int = 200) -> Tensor:
    X = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    given = {
        "normal": X,
        "falling": X * torch.arange(1, n + 1) ** -0.5,
        "low rank": X[:5],
        "repeated": torch.eye(n) * (1 + torch.arange(n) // 50),
        "one value": torch.eye(n),
        "zero": 0 * X,
    }[kind]
    return given.T @ given


@pytest.mark.parametrize("kind", ["normal", "falling", "low rank", "repeated", "one value", "zero"])
@pytest.mark.parametrize("count", [1, 30, 150, 200, "every"])
def test_by_definition(kind: str, count: int | str):
    G = gram(kind)
    found = leading(G.tril(), count) if isinstance(count, int) else every(G.tril())
    count = found.values.shape[0]
    size = float(G.norm()) or 1.0
    torch.testing.assert_close(found.values / size, torch.linalg.eigvalsh(G.double())[-count:].float() / size)
    torch.testing.assert_close(found.vectors.T @ found.vectors, torch.eye(count), rtol=0, atol=2e-5)
    assert float((G @ found.vectors - found.vectors * found.values).norm()) < 2e-5 * size


def test_the_matrix_stays():
    G = gram("normal")
    leading(G, 3)
    assert torch.equal(G, gram("normal"))


def test_all_eigenvectors_where_some_do_not_converge(monkeypatch: pytest.MonkeyPatch):
    G = gram("falling")
    some = leading(G, 9)
    whole = every(G)
    monkeypatch.setattr(eigen, "_solved", lambda *_, **__: False)
    for values, vectors in (leading(G, 9), (whole.values[-9:], whole.vectors[:, -9:])):
        torch.testing.assert_close(some.values, values)
        torch.testing.assert_close((some.vectors.T @ vectors).abs(), torch.eye(9), rtol=0, atol=1e-3)


def test_threads(monkeypatch: pytest.MonkeyPatch):
    """Calls at the same time give what each gives alone, on torch's number of threads, which is set back at the end."""
    grams = [gram("falling", 150 + i) for i in range(12)]
    alone = [leading(G, 20) for G in grams]
    before, torch_before = eigen._threads.count(), torch.get_num_threads()
    seen = []
    routine = eigen._routine

    def watched(name: str, arguments: int) -> Any:
        def call(*given: Any) -> None:
            seen.append((eigen._threads.calls, eigen._threads.count()))
            routine(name, arguments)(*given)

        return call

    monkeypatch.setattr(eigen, "_routine", watched)
    torch.set_num_threads(1)
    try:
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(lambda G: leading(G, 20), grams))
    finally:
        torch.set_num_threads(torch_before)
    assert before > 0
    assert eigen._threads.count() == before
    assert {count for calls, count in seen if calls} == {1}
    for one, other in zip(alone, together, strict=True):
        torch.testing.assert_close(one.values, other.values, rtol=0, atol=1e-5 * float(one.values[-1]))
