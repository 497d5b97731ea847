"""One fine-tune of one tiny model through an adapter and back: what every architecture must survive.

The base is saved and loaded by its own library, changed at random, and the change carried in a PEFT folder at
full rank. The real PEFT loads that folder onto the base: it must report no missing and no unexpected key and
give the fine-tune's outputs, and so must the merged model.
"""

from __future__ import annotations

import copy
import json
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft import Carry, carry, open_peft, save
from mergekit_lr.checkpoint.layout import Layout, parameters
from mergekit_lr.checkpoint.parameter import Kind, Parameter

FLIPPED = (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_TRANSPOSED)
OUTPUTS = ("logits", "prediction_logits", "last_hidden_state", "logits_per_image", "sample")


@dataclass
class Extracted:
    """What the extraction of one fine-tune came to."""

    layout: Layout
    plan: Carry
    adapter: Adapter
    folder: Path


def read(folder: Path) -> tuple[dict[str, Tensor], dict]:
    """All tensors and the config of a saved model."""
    tensors: dict[str, Tensor] = {}
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, "pt") as handle:
            tensors |= {name: handle.get_tensor(name) for name in handle.keys()}  # noqa: SIM118
    return tensors, json.loads((folder / "config.json").read_text())


def in_memory(parameter: Parameter, tensors: dict[str, Tensor]) -> Tensor:
    """A parameter put together from the tensors on disk, as its layout says."""
    matrices = []
    for blocks in parameter.blocks:
        parts = []
        for block in blocks:
            part = tensors[block.tensor] if block.index is None else tensors[block.tensor][block.index]
            parts.append(part if block.rows is None else part[slice(*block.rows)])
        matrices.append(torch.cat(parts, parameter.join) if len(parts) > 1 else parts[0])
    stacked = parameter.kind in (Kind.EXPERTS, Kind.EXPERTS_TRANSPOSED) or len(matrices) > 1
    return torch.stack(matrices) if stacked else matrices[0]


def factors(parameter: Parameter, delta: Tensor) -> AdaptedWeight:
    """The delta at full rank, balanced, in linear layout."""
    matrix = delta.mT if parameter.kind in FLIPPED else delta
    if parameter.kind is Kind.CONVOLUTION:
        matrix = delta.flatten(1)
    U, S, Vh = torch.linalg.svd(matrix.double(), full_matrices=False)
    root = S.sqrt()
    A, B = root[..., :, None] * Vh, U * root[..., None, :]
    return AdaptedWeight(parameter.kind, LowRank(A.float(), B.float()), parameter.shape)


def extract(base: Path, finetuned: Path, out: Path, *, tables: bool) -> Extracted:
    """The whole way from two folders to an adapter folder."""
    old, config = read(base)
    new, _ = read(finetuned)
    layout = parameters({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in old.items()}, config)
    before = {p.name: in_memory(p, old) for p in layout.parameters}
    after = {p.name: in_memory(p, new) for p in layout.parameters}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    plan = carry(layout, changed, tables=tables)
    weights = {name: factors(layout.by_name[name], after[name] - before[name]) for name in plan.factors}
    adapter = Adapter(weights, {name: after[name] for name in plan.saved})
    out.mkdir()
    save(adapter, out, layout=layout)
    return Extracted(layout, plan, adapter, out)


def change(model: nn.Module, *, everything: bool) -> nn.Module:
    """A copy with a random delta on every matrix, or on every parameter."""
    model = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for parameter in model.parameters():
            if everything or parameter.ndim > 1:
                size = 0.3 * (parameter.std() if parameter.numel() > 1 else torch.tensor(1.0)).clamp_min(0.02)
                parameter += size * torch.randn(parameter.shape, generator=generator)
    return model


def load(model: nn.Module, folder: Path) -> PeftModel:
    """Real PEFT, and nothing missing, nothing unexpected, no pattern without its module."""
    results = []
    original = PeftModel.load_adapter

    def recording(*args, **kwargs):
        results.append(original(*args, **kwargs))
        return results[-1]

    with warnings.catch_warnings(record=True) as caught, mock.patch.object(PeftModel, "load_adapter", recording):
        warnings.simplefilter("always")
        adapted = PeftModel.from_pretrained(copy.deepcopy(model), str(folder))
    assert [(result.missing_keys, result.unexpected_keys) for result in results] == [([], [])]
    bad = ("missing", "did not match", "no module was matched", "no parameter was matched")
    assert not [str(w.message) for w in caught if any(part in str(w.message) for part in bad)]
    return adapted.eval()


def output(model: nn.Module, inputs: dict) -> Tensor:
    """The first output of a model that is a tensor of interest."""
    with torch.no_grad():
        result = model(**inputs)
    return next(result[key] for key in OUTPUTS if key in result)


def distance(one: Tensor, other: Tensor) -> float:
    """Relative distance of two outputs."""
    return ((one - other).norm() / other.norm()).item()


def roundtrip(
    model: nn.Module,
    inputs: dict,
    tmp_path: Path,
    *,
    everything: bool,
    tables: bool = True,
    rewrite: Callable[[Path], None] | None = None,
) -> Extracted:
    """Fine-tune, extract, load by PEFT, compare; ``rewrite`` may change how the folders are written on disk."""
    kind = type(model)
    model.eval().save_pretrained(tmp_path / "base")
    base = kind.from_pretrained(tmp_path / "base").eval()
    tuned = change(base, everything=everything).eval()
    tuned.save_pretrained(tmp_path / "tuned")
    if rewrite:
        rewrite(tmp_path / "base")
        rewrite(tmp_path / "tuned")
        base = kind.from_pretrained(tmp_path / "base").eval()

    made = extract(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", tables=tables)
    check_layout(made.layout, base, tmp_path / "base")

    wanted = output(tuned, inputs)
    assert distance(output(base, inputs), wanted) > 1e-2
    adapted = load(base, made.folder)
    assert distance(output(adapted, inputs), wanted) < 1e-4
    # PEFT adds the factors of a tied table once per end when it merges; ``Carry.notes`` says so.
    if not any(len(made.layout.ends(name)) > 1 for name in made.plan.factors):
        assert distance(output(adapted.merge_and_unload(), inputs), wanted) < 1e-4
    check_reading(made)
    return made


def check_layout(layout: Layout, model: nn.Module, folder: Path) -> None:
    """Every tensor on disk is named once, and every parameter is what the model has in memory."""
    tensors, _ = read(folder)
    used = {block.tensor for p in layout.parameters for blocks in p.blocks for block in blocks}
    assert used | set(layout.unused) == set(tensors)
    assert not used & set(layout.unused)
    memory = model.state_dict()
    for parameter in (*layout.parameters, *layout.tied):
        assert torch.equal(in_memory(parameter, tensors), memory[parameter.name]), parameter.name


def check_reading(made: Extracted) -> None:
    """The folder read back is the adapter, with the layout and without it."""
    again = open_peft(made.folder, layout=made.layout)
    expected = {name: weight for name, weight in made.adapter.weights.items() if weight.delta.rank}
    ends = {end.name for name in expected for end in made.layout.ends(name)}
    assert set(again.weights) == ends
    for name, weight in expected.items():
        assert again.weights[name].kind == weight.kind
        torch.testing.assert_close(again.weights[name].delta.dense(), weight.delta.dense())
    for name, tensor in made.adapter.saved.items():
        assert torch.equal(again.saved[name], tensor)
    assert set(open_peft(made.folder).weights) == ends
