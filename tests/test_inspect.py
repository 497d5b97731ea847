"""Inspection: names, kinds, norms and spectra are those of the tensors themselves."""

from __future__ import annotations

import json

import pytest
import tiny
import torch
from tiny import DOWN, NORM, TABLE, lrmerge

import mergekit_lr as lr
from mergekit_lr.errors import LrmergeError
from mergekit_lr.verbs.inspect import AdapterView, CheckpointView


@pytest.fixture
def base(tmp_path):
    return tiny.save(tmp_path / "base", tiny.decoder(), shards=2)


@pytest.fixture
def adapter(base, tmp_path):
    tuned = tiny.finetuned(tiny.decoder())
    tuned[NORM] = tuned[NORM] + 1
    lr.extract(base, tiny.save(tmp_path / "tuned", tuned), tmp_path / "adapter", rank=5)
    return tmp_path / "adapter"


def test_a_checkpoint(base):
    tensors = tiny.decoder()
    view = lr.inspect(base)
    assert isinstance(view, CheckpointView)
    assert view.architecture == "LlamaForCausalLM"
    assert view.nbytes == sum(t.nbytes for t in tensors.values())
    entries = {entry.name: entry for entry in view.entries}
    assert entries.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert entries[name].shape == tuple(tensor.shape)
        assert entries[name].norm == pytest.approx(float(tensor.double().norm()), rel=1e-6)
    kinds = {name: entry.kind for name, entry in entries.items()}
    assert (kinds[TABLE], kinds[DOWN], kinds[NORM]) == ("embedding", "linear", "vector")
    assert sum(group.count for group in view.groups) == len(tensors)
    assert sum(group.nbytes for group in view.groups) == view.nbytes


def test_an_adapter(adapter):
    view = lr.inspect(adapter)
    assert isinstance(view, AdapterView)
    assert view.dialect == "peft"
    written = tiny.factors(adapter)
    modules = {module.name: module for module in view.modules}
    assert modules.keys() == written.keys()
    for name, delta in written.items():
        values = torch.linalg.svdvals(delta)[:5]
        assert modules[name].rank == 5
        assert modules[name].norm == pytest.approx(float(delta.norm()), rel=1e-5)
        assert modules[name].singular_values == pytest.approx(values.tolist(), rel=1e-4)
        shares = values.square() / values.square().sum()
        assert modules[name].effective_rank == pytest.approx(float(torch.exp(-(shares * shares.log()).sum())), rel=1e-4)
        assert modules[name].rank_for(1.0) == 5
        assert modules[name].rank_for(float(shares[0]) - 1e-3) == 1
    assert view.total_rank == 5 * len(written)
    assert view.norm == pytest.approx(sum(float(d.square().sum()) for d in written.values()) ** 0.5, rel=1e-5)
    assert list(view.saved) == [NORM]
    assert [m.name for m in view.largest(2)] == [m.name for m in view.modules if m in view.largest(2)]


@pytest.mark.parametrize("place", ["base", "adapter"])
def test_on_the_command_line(base, adapter, place):
    folder = {"base": base, "adapter": adapter}[place]
    view = lr.inspect(folder)
    printed = json.loads(lrmerge("inspect", folder, "--json").out)
    assert printed == json.loads(json.dumps(view.to_json()))
    shown = lrmerge("inspect", folder, "-v")
    assert shown.code == 0
    held = set(tiny.decoder()) if place == "base" else tiny.factors(adapter).keys() | tiny.saved(adapter).keys()
    assert all(name.removesuffix(".weight") in shown.out for name in held)
    only = json.loads(lrmerge("inspect", folder, "--json", "--match", "down_proj").out)
    named = only["entries"] if place == "base" else only["modules"]
    assert [entry["name"] for entry in named] == [DOWN, DOWN.replace("0", "1")]


def test_what_cannot_be_inspected(base, adapter, tmp_path):
    tiny.refused("inspect", base, "--match", "[", code=2, words=("--match",))
    tiny.refused("inspect", base, "--match", "nowhere", code=1, words=("nowhere",))
    tiny.refused("inspect", adapter, "--match", "nowhere", code=1, words=("nowhere",))
    tiny.refused("inspect", tmp_path / "nothing", code=1, words=("nothing",))
    (adapter / "adapter_model.safetensors").unlink()
    tiny.refused("inspect", adapter, code=1, words=(str(adapter),))
    with pytest.raises(LrmergeError):
        lr.inspect(adapter)
