"""PEFT's folder both ways: what PEFT writes is read as PEFT means it, what is written here PEFT loads."""

import copy
import json
import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model
from peft.utils.save_and_load import get_base_model_state_dict
from safetensors.torch import load_file, save_file
from torch import nn
from torch.testing import assert_close
from transformers import Conv1D

from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.peft import carry, open_peft, save
from mergekit_lr.checkpoint.layout import Layout
from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter
from mergekit_lr.errors import FormatError, MismatchError, UsageError


class Experts(nn.Module):
    """Two stacked parameters, (E, d_out, d_in)."""

    num_experts = 3

    def __init__(self):
        super().__init__()
        self.gate_up_proj = nn.Parameter(torch.randn(3, 10, 6))
        self.down_proj = nn.Parameter(torch.randn(3, 6, 5))

    def forward(self, x):
        gate, up = torch.einsum("eoi,bi->ebo", self.gate_up_proj, x).chunk(2, -1)
        return torch.einsum("eoi,ebi->bo", self.down_proj, gate.sigmoid() * up)


class Model(nn.Module):
    """One layer of each kind, a norm whose name is the end of another's, and a parameter of its own."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Embedding(11, 6)
        self.norm = nn.LayerNorm(6)
        self.layernorm = nn.LayerNorm(6)
        self.shift = nn.Parameter(torch.randn(1, 1, 6))
        self.block = nn.ModuleDict({"proj": nn.Linear(6, 6), "experts": Experts(), "head": Conv1D(4, 6)})
        self.conv = nn.Conv1d(6, 6, 3, padding=1)
        self.proj = nn.Linear(6, 6)

    def forward(self, ids):
        x = self.layernorm(self.norm(self.embed(ids) + self.shift))
        x = x + self.conv(x.mT).mT
        x = self.proj(self.block["proj"](x))
        x = x + self.block["experts"](x.reshape(-1, 6)).reshape(x.shape)
        return self.block["head"](x)


KINDS = {
    "embed.weight": Kind.EMBEDDING,
    "block.proj.weight": Kind.LINEAR,
    "block.experts.gate_up_proj": Kind.EXPERTS,
    "block.experts.down_proj": Kind.EXPERTS,
    "block.head.weight": Kind.TRANSPOSED,
    "conv.weight": Kind.CONVOLUTION,
    "proj.weight": Kind.LINEAR,
}
IDS = torch.tensor([[1, 5, 10], [0, 3, 7]])


def layout_of(model: nn.Module) -> Layout:
    found = []
    for name, tensor in model.state_dict().items():
        kind = KINDS.get(name, Kind.VECTOR if tensor.ndim < 2 else Kind.OTHER)
        carrier = "" if name not in KINDS else "parameter" if kind is Kind.EXPERTS else "module"
        found.append(Parameter(name, kind, tuple(tensor.shape), ((Block(name),),), carrier=carrier))
    return Layout(tuple(found))


def dense_change(weight: AdaptedWeight) -> torch.Tensor:
    """The delta in the parameter's own layout."""
    dense = weight.delta.dense()
    if weight.kind in (Kind.EMBEDDING, Kind.TRANSPOSED):
        return dense.mT
    return dense.reshape(weight.shape) if weight.kind is Kind.CONVOLUTION else dense


def random_weight(parameter: Parameter, rank: int, scaling: float = 1.0) -> AdaptedWeight:
    d_out, d_in = parameter.matrix_shape
    stack = parameter.shape[:1] if parameter.kind is Kind.EXPERTS else ()
    delta = LowRank(torch.randn(*stack, rank, d_in), torch.randn(*stack, d_out, rank), scaling)
    return AdaptedWeight(parameter.kind, delta, parameter.shape)


def changed(model: Model, adapter: Adapter) -> Model:
    """The model with the adapter's changes in its weights."""
    other = Model()
    state = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    for name, weight in adapter.weights.items():
        state[name] += dense_change(weight)
    other.load_state_dict(state | adapter.saved)
    return other


def loads(model: Model, folder: Path) -> PeftModel:
    """A copy of the model with the adapter, as ``PeftModel.from_pretrained`` builds it."""
    adapted = PeftModel(copy.deepcopy(model), LoraConfig.from_pretrained(folder))
    result = adapted.load_adapter(folder, "default")
    assert not result.missing_keys
    assert not result.unexpected_keys
    return adapted.eval()


@settings(deadline=None, max_examples=25, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_any_mixture_of_changes_is_loaded_by_peft(data, tmp_path_factory):
    """Any subset of weights at any ranks and scales, any of the rest in full: PEFT gives the changed model."""
    folder = tmp_path_factory.mktemp("adapter")
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    model = Model().eval()
    layout = layout_of(model)
    changes = data.draw(st.sets(st.sampled_from([p.name for p in layout.parameters]), min_size=1))
    plan = carry(layout, changes, full=data.draw(st.sets(st.sampled_from(sorted(KINDS)))))
    assert not plan.refused
    assert changes <= {*plan.factors, *plan.saved}
    weights = {
        name: random_weight(
            layout.by_name[name], data.draw(st.integers(0, 3)), data.draw(st.sampled_from([1.0, 0.5, 2.0]))
        )
        for name in plan.factors
    }
    state = model.state_dict()
    saved = {name: state[name] + torch.randn_like(state[name]) * (name in changes) for name in plan.saved}
    adapter = Adapter(weights, saved)
    save(adapter, folder, layout=layout)

    expected = changed(model, adapter)(IDS)
    adapted = loads(model, folder)
    assert_close(adapted(IDS), expected, rtol=1e-4, atol=1e-4)
    assert_close(adapted.merge_and_unload()(IDS), expected, rtol=1e-4, atol=1e-4)

    kept = {name: weight for name, weight in weights.items() if weight.delta.rank}
    for again in (open_peft(folder), open_peft(folder, layout=layout)):
        assert set(again.weights) == set(kept)
        for name, weight in kept.items():
            assert_close(again.weights[name].delta.dense(), weight.delta.dense())
        assert set(again.saved) == set(saved)
        for name, tensor in saved.items():
            assert torch.equal(again.saved[name], tensor)


TRAINED = {
    "plain": {"target_modules": ["proj", "conv", "embed"]},
    "rslora": {"target_modules": ["proj", "block.head"], "use_rslora": True, "lora_alpha": 3, "r": 4},
    "patterns": {
        "target_modules": ["proj", "conv"],
        "rank_pattern": {"^proj": 3, "block.proj": 5, "conv": 1},
        "alpha_pattern": {"^proj": 7, "proj": 2},
    },
    "experts": {
        "target_modules": [],
        "target_parameters": ["experts.down_proj", "experts.gate_up_proj"],
        "rank_pattern": {"down_proj": 2},
    },
    "one stack": {"target_modules": [], "target_parameters": ["block.experts.down_proj"]},
    "lora_bias": {"target_modules": ["proj", "conv"], "lora_bias": True, "lora_alpha": 4},
    "bias": {"target_modules": ["block.proj", "conv"], "bias": "lora_only"},
    "dora": {"target_modules": ["proj"], "use_dora": True},
    "saved": {"target_modules": ["block.proj"], "modules_to_save": ["layernorm"]},
    "tokens": {"target_modules": ["proj"], "trainable_token_indices": {"embed": [2, 5]}},
    "linear parameter": {"target_modules": [], "target_parameters": ["block.proj.weight"]},
}


def trained(options: dict) -> PeftModel:
    """An adapter that PEFT made, with random values in all that it trains."""
    torch.manual_seed(1)
    model = get_peft_model(Model(), LoraConfig(**{"r": 2, "lora_alpha": 4, **options})).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.requires_grad and "magnitude" not in name:
                parameter.copy_(torch.randn_like(parameter))
    return model


@pytest.mark.parametrize("options", TRAINED.values(), ids=TRAINED)
def test_what_peft_writes_survives_the_way_through_an_adapter(options, tmp_path):
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    ours.mkdir()
    model = trained(options)
    model.save_pretrained(theirs)
    adapter = open_peft(theirs)
    save(adapter, ours)

    before, after = load_file(theirs / "adapter_model.safetensors"), load_file(ours / "adapter_model.safetensors")
    assert set(before) == set(after)
    for key, tensor in before.items():
        assert_close(after[key], tensor)
    base = Model()
    base.load_state_dict(get_base_model_state_dict(model))
    assert_close(loads(base, ours)(IDS), model(IDS), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("name", ["plain", "rslora", "patterns", "experts", "one stack", "linear parameter"])
def test_factors_and_scales_are_read_as_peft_means_them(name, tmp_path):
    model = trained(TRAINED[name])
    model.save_pretrained(tmp_path)
    base = {key: tensor.clone() for key, tensor in get_base_model_state_dict(model).items()}
    adapter = open_peft(tmp_path, layout=layout_of(Model()))
    merged = model.merge_and_unload().state_dict()
    assert adapter.weights
    for key, tensor in merged.items():
        expected = base[key] + (dense_change(adapter.weights[key]) if key in adapter.weights else 0)
        assert_close(tensor, expected, rtol=1e-4, atol=1e-5)


def test_a_name_that_ends_another_is_targeted_alone(tmp_path):
    """PEFT takes ``proj`` for ``block.proj`` too, and a saved ``norm`` for ``layernorm``."""
    model, layout = Model(), layout_of(Model())
    plan = carry(layout, ["proj.weight", "norm.weight"])
    assert plan.factors == ("proj.weight",)
    assert plan.base == plan.saved == ("norm.weight",)
    adapter = Adapter({"proj.weight": random_weight(layout.by_name["proj.weight"], 2)}, {"norm.weight": torch.ones(6)})
    save(adapter, tmp_path, layout=layout)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert config["target_modules"] == "proj"
    assert config["modules_to_save"] is None
    assert_close(loads(model, tmp_path)(IDS), changed(model, adapter)(IDS), rtol=1e-5, atol=1e-5)


def test_a_norm_is_saved_whole_and_a_bias_alone(tmp_path):
    layout = layout_of(Model())
    plan = carry(layout, ["layernorm.bias", "conv.bias", "shift"])
    assert plan.saved == ("shift", "layernorm.weight", "layernorm.bias", "conv.bias")
    assert plan.base == ("shift", "conv.bias")
    assert plan.reasons == {"shift": "no LoRA layer exists for a parameter of this kind"}
    assert any("disabling the adapter does not undo" in note for note in plan.notes)


def test_what_no_parameter_takes_is_refused_by_name():
    layout = Layout(layout_of(Model()).parameters, unused={"extra.weight": "no parameter of Model"})
    plan = carry(layout, ["extra.weight", "ghost"])
    assert plan.refused == {"extra.weight": "no parameter of Model", "ghost": "the model has no such parameter"}
    assert not plan.factors
    assert not plan.saved


def tied_layout() -> Layout:
    table = Parameter("embed.weight", Kind.EMBEDDING, (9, 4), ((Block("embed.weight"),),), carrier="module")
    head = Parameter("head.weight", Kind.LINEAR, (9, 4), ((Block("embed.weight"),),), carrier="module")
    return Layout((table,), (head,), {"head.weight": "embed.weight"})


def test_a_tied_table_has_its_factors_at_both_ends(tmp_path):
    layout = tied_layout()
    plan = carry(layout, ["embed.weight"])
    assert plan.factors == ("embed.weight",)
    assert any("merge_and_unload would add them once per end" in note for note in plan.notes)
    weight = random_weight(layout.by_name["embed.weight"], 2)
    save(Adapter({"embed.weight": weight}), tmp_path, layout=layout)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    A, B = (tensors[f"base_model.model.head.lora_{x}.weight"] for x in "AB")
    assert_close(B @ A, weight.delta.dense().mT)


def test_a_tied_table_in_full_is_saved_at_both_ends(tmp_path):
    layout = tied_layout()
    plan = carry(layout, ["embed.weight"], tables=False)
    assert plan.saved == ("embed.weight",)
    assert plan.base == ()
    save(Adapter({}, {"embed.weight": torch.ones(9, 4)}), tmp_path, layout=layout)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    assert set(tensors) == {"base_model.model.embed.weight", "base_model.model.head.weight"}
    assert json.loads((tmp_path / "adapter_config.json").read_text())["modules_to_save"] == ["embed", "head"]


def test_a_tie_with_an_end_that_bears_no_factors_goes_in_full():
    layout = tied_layout()
    head = Parameter("head.weight", Kind.LINEAR, (9, 4), ((Block("embed.weight"),),), obstacle="read directly")
    plan = carry(Layout(layout.parameters, (head,), layout.ties), ["embed.weight"])
    assert not plan.factors
    assert plan.reasons == {"embed.weight": "read directly"}


def test_many_ranks_share_few_patterns(tmp_path):
    """Python keeps 512 compiled patterns: a key per module would make PEFT compile for minutes."""
    kind = Kind.LINEAR
    weights = {
        f"layers.{n}.proj.weight": AdaptedWeight(kind, LowRank(torch.ones(1 + n % 3, 4), torch.ones(4, 1 + n % 3)))
        for n in range(400)
    }
    save(Adapter(weights), tmp_path)
    config = json.loads((tmp_path / "adapter_config.json").read_text())
    assert len(config["rank_pattern"]) == len(config["alpha_pattern"]) == 2
    again = open_peft(tmp_path)
    assert {name: weight.delta.rank for name, weight in again.weights.items()} == {
        name: weight.delta.rank for name, weight in weights.items()
    }
    assert all(weight.delta.scaling == 1 for weight in again.weights.values())


@pytest.mark.parametrize(
    ("task", "saved", "expected"),
    [
        ("CAUSAL_LM", [], "CAUSAL_LM"),
        ("SEQ_CLS", [], None),
        ("SEQ_CLS", ["classifier.weight"], "SEQ_CLS"),
        ("SEQ_2_SEQ_LM", [], None),
    ],
)
def test_a_task_type_that_asks_for_more_than_the_file_has_is_left_out(task, saved, expected, tmp_path):
    parts = [("body.weight", Kind.LINEAR), ("classifier.weight", Kind.LINEAR)]
    layout = Layout(tuple(Parameter(n, k, (4, 4), ((Block(n),),), carrier="module") for n, k in parts))
    weight = random_weight(layout.by_name["body.weight"], 1)
    adapter = Adapter({"body.weight": weight}, {name: torch.ones(4, 4) for name in saved})
    save(adapter, tmp_path, layout=layout, task_type=task)
    assert json.loads((tmp_path / "adapter_config.json").read_text())["task_type"] == expected


def write(folder, tensors, **config):
    save_file(tensors, folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2, "lora_alpha": 4, **config}))


PAIR = {"lora_A.weight": torch.ones(2, 4), "lora_B.weight": torch.ones(4, 2)}


@pytest.mark.parametrize(
    "spelling",
    [
        "base_model.model.x.q.lora_{}.weight",
        "x.q.lora_{}.weight",
        "base_model.model.x.q.lora_{}.default.weight",
        "base_model.model.x.base_layer.q.lora_{}.weight",
    ],
)
def test_keys_are_read_in_every_spelling(spelling, tmp_path):
    write(tmp_path, {spelling.format("A"): torch.ones(2, 4), spelling.format("B"): torch.ones(4, 2)})
    adapter = open_peft(tmp_path)
    assert list(adapter.weights) == ["x.q.weight"]
    assert adapter.weights["x.q.weight"].delta.scaling == 2


def test_the_first_pattern_in_the_file_wins(tmp_path):
    tensors = {f"base_model.model.x.q.{key}": tensor for key, tensor in PAIR.items()}
    write(tmp_path, tensors, r=8, rank_pattern={"q": 2, "x.q": 5}, alpha_pattern={"other": 1, "x.q": 6, "q": 9})
    assert open_peft(tmp_path).weights["x.q.weight"].delta.scaling == 3


def test_fields_of_others_and_notes(tmp_path):
    tensors = {f"base_model.model.q.{key}": tensor for key, tensor in PAIR.items()}
    write(tmp_path, tensors, init_lora_weights="pissa_niter_4", some_future_field={"a": 1}, task_type="CAUSAL_LM")
    adapter = open_peft(tmp_path)
    assert "pissa_niter_4" in adapter.config["notes"][0]
    (tmp_path / "out").mkdir()
    save(adapter, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "adapter_config.json").read_text())
    assert config["some_future_field"] == {"a": 1}
    assert config["task_type"] == "CAUSAL_LM"
    assert config["init_lora_weights"] is True
    assert "notes" not in config


@pytest.mark.parametrize(
    ("tensors", "config", "message"),
    [
        (PAIR, {"peft_type": "IA3"}, "peft_type is IA3, expected LORA"),
        (PAIR, {"layer_replication": [[0, 2], [1, 3]]}, "layer_replication is set"),
        (PAIR, {"kasa_config": {"beta": 1}}, "kasa_config is set"),
        (PAIR, {"r": 3}, "A [2, 4], B [4, 2] and rank 3 of the config do not fit"),
        ({"lora_A.weight": torch.ones(2, 4)}, {}, "the adapter has lora_A, expected both factors"),
        (PAIR, {"r": 1}, "the factors have rank 2, the config says 1"),
        ({**PAIR, "lora_B.weight": torch.ones(4, 3)}, {}, "do not fit"),
        ({"token_adapter.trainable_tokens_delta": torch.ones(1, 4)}, {}, "no trainable_token_indices"),
        ({**PAIR, **{f"base_layer.{k}": t.clone() for k, t in PAIR.items()}}, {}, "2 LoRA layers in the file"),
    ],
)
def test_adapters_that_cannot_be_read_are_refused(tensors, config, message, tmp_path):
    write(tmp_path, {f"base_model.model.q.{key}": tensor for key, tensor in tensors.items()}, **config)
    with pytest.raises(FormatError, match=re.escape(message)):
        open_peft(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("adapter_config.json", None, "no such file"),
        ("adapter_config.json", b"{", "not JSON"),
        ("adapter_config.json", b"[]", "peft_type is list"),
        ("adapter_model.safetensors", None, "no such file"),
        ("adapter_model.safetensors", b"\xff" * 20, "adapter_model.safetensors"),
    ],
)
def test_broken_files_are_named(name, content, message, tmp_path):
    write(tmp_path, {f"base_model.model.q.{key}": tensor for key, tensor in PAIR.items()})
    (tmp_path / name).unlink()
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(FormatError, match=message):
        open_peft(tmp_path)


def test_writing_refuses_what_the_base_does_not_have_or_peft_cannot_hold(tmp_path):
    layout = layout_of(Model())
    weight = random_weight(layout.by_name["proj.weight"], 1)
    with pytest.raises(MismatchError, match=r"no parameter ghost.weight"):
        save(Adapter({"ghost.weight": weight}), tmp_path, layout=layout)
    with pytest.raises(MismatchError, match=r"no parameter ghost.bias, which the adapter saves"):
        save(Adapter({}, {"ghost.bias": torch.ones(2)}), tmp_path, layout=layout)
    with pytest.raises(UsageError, match=r"cannot put factors on norm.weight"):
        save(Adapter({"norm.weight": weight}), tmp_path, layout=layout)
    some = AdaptedWeight(Kind.LINEAR, weight.delta, magnitude=torch.ones(6))
    with pytest.raises(FormatError, match="DoRA on all weights or on none"):
        save(Adapter({"proj.weight": some, "block.proj.weight": weight}), tmp_path)
    bias = AdaptedWeight(Kind.LINEAR, weight.delta, bias=torch.ones(6))
    table = random_weight(layout.by_name["embed.weight"], 1)
    with pytest.raises(FormatError, match=r"no lora_bias for embed.weight"):
        save(Adapter({"proj.weight": bias, "embed.weight": table}), tmp_path)
    kernel = AdaptedWeight(Kind.CONVOLUTION, LowRank(torch.ones(1, 18), torch.ones(6, 1)))
    with pytest.raises(FormatError, match=r"kernel of the convolution conv.weight is not known"):
        save(Adapter({"conv.weight": kernel}), tmp_path)
    assert not list(tmp_path.iterdir())


def test_the_revision_of_the_base_stands_apart(tmp_path):
    """PEFT looks for the base under its name alone, at the revision beside it."""
    adapter = Adapter({"layer.weight": AdaptedWeight(Kind.LINEAR, LowRank(torch.ones(2, 6), torch.ones(4, 2)))})
    for number, (base, name, revision) in enumerate([("o/b@v1.0", "o/b", "v1.0"), ("o/b", "o/b", None)]):
        folder = tmp_path / f"{number}"
        folder.mkdir()
        save(replace(adapter, base=base), folder)
        config = PeftConfig.from_pretrained(folder)
        assert (config.base_model_name_or_path, config.revision) == (name, revision)
        assert open_peft(folder).base == base
