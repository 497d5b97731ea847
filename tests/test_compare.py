"""``compare``: every figure from Gram matrices of factors against its dense definition."""

from __future__ import annotations

import json

import pytest
import torch

import mergekit_lr as lr
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.checkpoint.parameter import Kind
from mergekit_lr.report.heatmaps import by_layer, draw_comparison


def adapter(seed: int, *, rank: int = 3, layers: int = 2, scaling: float = 1.0, lead: tuple[int, ...] = ()) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for layer in range(layers):
        a = torch.randn(*lead, rank, 7, generator=generator)
        b = torch.randn(*lead, 5, rank, generator=generator)
        kind = Kind.EXPERTS if lead else Kind.LINEAR
        weights[f"model.layers.{layer}.up.weight"] = AdaptedWeight(kind, LowRank(a, b, scaling))
    return Adapter(weights)


def dense(of: Adapter) -> list[torch.Tensor]:
    return [w.delta.dense().double() for w in of.weights.values()]


@pytest.mark.parametrize("lead", [(), (4,)], ids=["matrices", "experts"])
def test_cosine_is_that_of_the_whole_deltas(lead):
    adapters = [adapter(1, lead=lead), adapter(2, rank=2, scaling=0.5, lead=lead), adapter(3, scaling=-2.0, lead=lead)]
    flat = torch.stack([torch.cat([d.reshape(-1) for d in dense(a)]) for a in adapters])
    expected = torch.nn.functional.normalize(flat, dim=1) @ torch.nn.functional.normalize(flat, dim=1).mT
    report = lr.compare(adapters)
    assert torch.allclose(torch.tensor(report.cosine, dtype=torch.float64), expected, atol=1e-6)
    assert torch.allclose(torch.tensor(report.norms, dtype=torch.float64), flat.norm(dim=1), rtol=1e-6)


def test_overlap_signs_and_interference_are_their_dense_definitions():
    adapters = [adapter(1), adapter(2, rank=2)]
    report = lr.compare(adapters)
    for index, module in enumerate(report.modules):
        deltas = [dense(a)[index] for a in adapters]
        svds = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
        ranks = [3, 2]
        u, v = (
            [svd[i][:, :r] if i == 0 else svd[i][:r].mT for svd, r in zip(svds, ranks, strict=True)] for i in (0, 2)
        )
        assert module.output[0][1] == pytest.approx(float((u[0].mT @ u[1]).square().sum()) / 2, abs=1e-5)
        assert module.input[0][1] == pytest.approx(float((v[0].mT @ v[1]).square().sum()) / 2, abs=1e-5)
        opposite = (deltas[0] * deltas[1] < 0).double().mean()
        assert module.opposite[0][1] == pytest.approx(float(opposite), abs=1e-6)
        joint_u, joint_v = torch.cat(u, 1), torch.cat(v, 1)
        s = torch.cat([svd[1][:r] for svd, r in zip(svds, ranks, strict=True)])
        eye = torch.eye(5, dtype=torch.float64)
        sti = ((joint_u.mT @ joint_u - eye) @ torch.diag(s) @ (joint_v.mT @ joint_v - eye)).abs().sum() / s.sum()
        assert module.interference == pytest.approx(float(sti), rel=1e-4)


def test_orthogonal_tasks_do_not_interfere():
    q, p = torch.linalg.qr(torch.randn(8, 8))[0], torch.linalg.qr(torch.randn(8, 8))[0]
    parts = [LowRank(p[i : i + 2].contiguous(), q[:, i : i + 2].contiguous()) for i in (0, 2)]
    report = lr.compare([Adapter({"a.weight": AdaptedWeight(Kind.LINEAR, part)}) for part in parts])
    assert report.interference < 1e-5
    assert abs(report.cosine[0][1]) < 1e-6
    assert any("orthogonal" in hint for hint in report.hints)


def test_an_adapter_against_itself_and_its_opposite():
    one = adapter(1)
    other = Adapter({n: AdaptedWeight(w.kind, -w.delta) for n, w in one.weights.items()})
    report = lr.compare([one, one, other])
    assert report.cosine[0] == pytest.approx((1.0, 1.0, -1.0), abs=1e-6)
    assert report.opposite[0] == pytest.approx((0.0, 0.0, 1.0))
    assert report.output[0] == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)


def test_modules_of_one_adapter_alone_and_zero_deltas_are_told():
    one, two = adapter(1, layers=3), adapter(2, layers=2)
    zero = Adapter({n: AdaptedWeight(w.kind, w.delta * 0.0) for n, w in two.weights.items()})
    report = lr.compare([one, two, zero])
    assert report.alone == {"model.layers.2.up.weight": 0}
    assert report.cosine[0][2] == 0.0
    assert report.norms[2] == 0.0
    json.dumps(report.to_json(), allow_nan=False)


def test_what_cannot_be_compared_is_refused():
    with pytest.raises(lr.LrmergeError, match="two adapters or more"):
        lr.compare([adapter(1)])
    with pytest.raises(lr.LrmergeError, match="no module in common"):
        lr.compare([adapter(1), Adapter({"x.weight": adapter(1).weights["model.layers.0.up.weight"]})])
    wide = Adapter(
        {n: AdaptedWeight(w.kind, LowRank(torch.ones(1, 9), torch.ones(5, 1))) for n, w in adapter(1).weights.items()}
    )
    with pytest.raises(lr.LrmergeError, match=r"\[5, 7\].*\[5, 9\]"):
        lr.compare([adapter(1), wide])


def test_pictures_have_a_cell_for_every_module(tmp_path):
    pytest.importorskip("matplotlib")
    report = lr.compare([adapter(1), adapter(2)])
    layers, kinds, cells = by_layer(report)
    assert (layers, kinds, len(cells)) == (["0", "1"], ["up"], 2)
    for ending in ("png", "svg"):
        draw_comparison(report, tmp_path / f"map.{ending}")
        assert (tmp_path / f"map.{ending}").stat().st_size > 1000
    with pytest.raises(lr.LrmergeError, match=r"\.png"):
        draw_comparison(report, tmp_path / "map.bmp")
