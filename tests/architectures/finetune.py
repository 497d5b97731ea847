"""One fine-tune of one tiny model through an adapter and back: what every architecture must survive.

The base is saved and loaded by its own library, changed at random, and the change carried in a PEFT folder at
full rank. The real PEFT loads that folder onto the base: it must report no missing and no unexpected key and
give the fine-tune's outputs, and so must the merged model.
"""

from __future__ import annotations

import ast
import copy
import json
import re
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

import torch
from peft import PeftModel
from safetensors import safe_open
from torch import Tensor, nn

from mergekit_lr.adapter.peft import Carry, carry, open_peft
from mergekit_lr.checkpoint.layout import Layout, parameters
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.verbs.extract import extract

FLIPPED = (Kind.TRANSPOSED, Kind.EMBEDDING, Kind.EXPERTS_TRANSPOSED)
OUTPUTS = ("logits", "prediction_logits", "last_hidden_state", "logits_per_image", "sample")


@dataclass
class Extracted:
    """What the extraction of one fine-tune came to; ``before`` and ``after`` by name in memory."""

    layout: Layout
    plan: Carry
    before: dict[str, Tensor]
    after: dict[str, Tensor]
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


def extracted(base: Path, finetuned: Path, out: Path, *, tables: bool) -> Extracted:
    """Extract without loss, and say beside it what the layout and the slots are."""
    extract(base, finetuned, out, error=0, embeddings="lora" if tables else "full", dtype="float32")
    old, config = read(base)
    new, _ = read(finetuned)
    layout = parameters({name: (tensor.dtype, tuple(tensor.shape)) for name, tensor in old.items()}, config)
    before = {p.name: in_memory(p, old) for p in layout.parameters}
    after = {p.name: in_memory(p, new) for p in layout.parameters}
    plan = carry(layout, {name for name in before if not torch.equal(before[name], after[name])}, tables=tables)
    return Extracted(layout, plan, before, after, out)


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
    (result,) = results
    assert not result.missing_keys
    assert not result.unexpected_keys
    wrapped = set(adapted.peft_config["default"].target_parameters or [])
    for message in (str(warning.message) for warning in caught):
        assert "missing" not in message
        assert "was matched" not in message
        if "did not match any targeted module" in message:
            # PEFT looks for the patterns of target_parameters among modules, warns, and obeys them all the same.
            patterns = ast.literal_eval(message[message.index("[") : message.index("]") + 1])
            assert {re.sub(r"[\\^]", "", pattern) for pattern in patterns} <= wrapped
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

    made = extracted(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", tables=tables)
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
    """The folder read back holds the changes of the fine-tune, with the layout and without it."""
    again = open_peft(made.folder, layout=made.layout)
    ends = {end.name for name in made.plan.factors for end in made.layout.ends(name)}
    assert set(again.weights) == ends
    for name in made.plan.factors:
        kind, delta = again.weights[name].kind, made.after[name] - made.before[name]
        assert kind == made.layout.by_name[name].kind
        matrix = delta.flatten(1) if kind is Kind.CONVOLUTION else delta.mT if kind in FLIPPED else delta
        torch.testing.assert_close(again.weights[name].delta.dense(), matrix, rtol=1e-4, atol=1e-5)
    for name in made.plan.saved:
        assert torch.equal(again.saved[name], made.after[name])
    assert set(open_peft(made.folder).weights) == ends
