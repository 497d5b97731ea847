"""Layouts: what is known from names, from the model's code, and from shapes, and that they agree where they meet."""

import subprocess
import sys
from importlib import util

import pytest
import torch
import transformers as T
from torch import nn
from torch.nn import functional as F

from mergekit_lr.checkpoint.architecture import from_transformers
from mergekit_lr.checkpoint.layout import parameters
from mergekit_lr.checkpoint.layout_kind import kind_of
from mergekit_lr.checkpoint.layout_use import bypassed
from mergekit_lr.checkpoint.parameter import Block, Kind

SMALL = {
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "vocab_size": 40,
}
ENCODER = {key: value for key, value in SMALL.items() if key != "num_key_value_heads"}


def headers(model, drop=()):
    names = model.state_dict()
    return {k: (v.dtype, tuple(v.shape)) for k, v in names.items() if not k.startswith(tuple(drop) or ("\0",))}


def on_meta(kind, settings):
    with torch.device("meta"):
        return kind(settings)


def config_of(model, architecture=None):
    return {**model.config.to_dict(), "architectures": [architecture or type(model).__name__]}


def llama(**more):
    return on_meta(T.LlamaForCausalLM, T.LlamaConfig(**SMALL, **more))


def test_a_plain_decoder_needs_no_transformers():
    script = """
import sys, torch
from mergekit_lr.checkpoint.layout import parameters
names = {"model.embed_tokens.weight": (9, 4), "model.layers.0.self_attn.q_proj.weight": (4, 4),
         "model.layers.0.input_layernorm.weight": (4,), "model.norm.weight": (4,)}
layout = parameters({n: (torch.float32, s) for n, s in names.items()},
                    {"model_type": "llama", "architectures": ["LlamaForCausalLM"]})
assert layout.source == "plain decoder names", layout.source
assert layout.ties == {"lm_head.weight": "model.embed_tokens.weight"}
assert not {"transformers", "diffusers", "peft", "huggingface_hub"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script], check=True)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        (T.LlamaForCausalLM, T.LlamaConfig),
        (T.Qwen2ForCausalLM, T.Qwen2Config),
        (T.Qwen3ForCausalLM, T.Qwen3Config),
        (T.MistralForCausalLM, T.MistralConfig),
        (T.Gemma2ForCausalLM, T.Gemma2Config),
        (T.Olmo2ForCausalLM, T.Olmo2Config),
    ],
    ids=lambda value: value.__name__,
)
def test_plain_names_say_what_transformers_says(kind, settings, tied):
    model = on_meta(kind, settings(**SMALL, tie_word_embeddings=tied))
    tensors = headers(model, drop=("lm_head",) if tied else ())
    plain = parameters(tensors, config_of(model))
    assert plain.source == "plain decoder names"
    coded = from_transformers({name: shape for name, (_, shape) in tensors.items()}, config_of(model))
    assert {p.name: p for p in plain.parameters} == {p.name: p for p in coded["parameters"]}
    assert plain.tied == coded["tied"]
    assert plain.ties == coded["ties"]


@pytest.mark.parametrize(
    ("tensors", "config"),
    [
        ({"model.layers.0.mlp.extra.weight": (4, 4)}, {}),
        ({"model.layers.0.self_attn.q_proj.weight": (4,)}, {}),
        ({}, {"architectures": ["LlamaForSequenceClassification"]}),
        ({}, {"num_experts": 4}),
        ({}, {"auto_map": {"AutoModel": "code.Model"}}),
        ({"lm_head.weight": (9, 4)}, {"tie_word_embeddings": True}),
    ],
    ids=["foreign name", "shape", "other class", "experts", "custom code", "tied head on disk"],
)
def test_what_is_not_plain_is_left_to_the_slower_ways(tensors, config):
    names = {"model.embed_tokens.weight": (9, 4), "model.norm.weight": (4,), **tensors}
    layout = parameters(
        {name: (torch.float32, shape) for name, shape in names.items()},
        {"architectures": ["LlamaForCausalLM"], **config},
    )
    assert layout.source == "shapes (the config names no architecture)"


def test_a_base_without_head_gets_the_prefix_of_the_model_with_one():
    body = on_meta(T.BertModel, T.BertConfig(**ENCODER))
    layout = parameters(headers(body), config_of(body, "BertForSequenceClassification"))
    assert layout.source == "transformers"
    assert not layout.unused
    query = layout.by_name["bert.encoder.layer.1.attention.self.query.weight"]
    assert query.blocks == ((Block("encoder.layer.1.attention.self.query.weight"),),)
    assert set(layout.missing) == {"classifier.weight", "classifier.bias"}


def test_a_model_with_head_is_read_as_one_without():
    model = llama(tie_word_embeddings=False)
    layout = parameters(headers(model), config_of(model, "LlamaModel"))
    assert layout.unused == {"lm_head.weight": "no parameter of LlamaModel"}
    assert layout.by_name["layers.0.mlp.up_proj.weight"].blocks == ((Block("model.layers.0.mlp.up_proj.weight"),),)


def test_a_fused_tensor_on_disk_is_cut_into_its_parameters():
    settings = T.NomicBertConfig(**ENCODER)
    model = on_meta(T.NomicBertModel, settings)
    tensors = headers(model)
    for name in [name for name in tensors if ".q_proj." in name]:
        for part in ("q_proj", "k_proj", "v_proj"):
            dtype, (rows, *rest) = tensors.pop(name.replace("q_proj", part))
        tensors["encoder." + name.replace("self_attn.q_proj", "attn.Wqkv")] = (dtype, (3 * rows, *rest))
    layout = parameters(tensors, config_of(model))
    assert not layout.unused
    assert not layout.missing
    key = layout.by_name["layers.1.self_attn.k_proj.weight"]
    assert key.blocks == ((Block("encoder.layers.1.attn.Wqkv.weight", rows=(16, 32)),),)


def test_a_tie_whose_ends_are_both_on_disk_is_two_parameters():
    model = llama(tie_word_embeddings=True)
    layout = parameters(headers(model), config_of(model))
    assert layout.source == "transformers"
    assert not layout.ties
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= {p.name for p in layout.parameters}


def test_the_present_end_of_a_tie_stands_for_the_absent_one():
    model = llama(tie_word_embeddings=True)
    layout = parameters(headers(model, drop=("model.embed",)), config_of(model, "LlamaForCausalLM"))
    assert layout.ties == {"model.embed_tokens.weight": "lm_head.weight"}
    assert [p.kind for p in layout.ends("lm_head.weight")] == [Kind.LINEAR, Kind.EMBEDDING]


def test_a_tensor_of_another_shape_than_the_config_says_is_named():
    model = on_meta(T.GPT2LMHeadModel, T.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=40))
    tensors = headers(model, drop=("lm_head",))
    tensors["transformer.wte.weight"] = (torch.float32, (44, 16))
    layout = parameters(tensors, config_of(model))
    assert layout.unused == {
        "transformer.wte.weight": "its shape is [44, 16], the config makes transformer.wte.weight [40, 16]"
    }


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (None, "the config names no architecture"),
        ({"model_type": "no_such_model"}, "knows no model type no_such_model"),
        ({"model_type": "llama", "hidden_size": "wide"}, "llama cannot be built here"),
        ({"model_type": "bert", "architectures": ["BertModel"]}, "tensors fit no parameter of BertModel"),
        ({"_class_name": "NoSuchTransformer"}, "diffusers knows no NoSuchTransformer"),
    ],
)
def test_shapes_are_the_last_resort_and_say_why(config, reason):
    names = {
        "tok_embed.weight": (50, 8),
        "blocks.10.proj.weight": (8, 8),
        "blocks.9.proj.weight": (8, 8),
        "blocks.9.proj.bias": (8,),
        "blocks.9.conv.weight": (8, 4, 3, 3),
        "blocks.9.depthwise.weight": (8, 1, 3, 3),
        "blocks.9.experts.up_proj": (4, 6, 8),
        "blocks.9.experts.down_proj": (4, 8, 6),
        "blocks.9.cls": (1, 1, 8),
        "mixer.dt_proj.weight": (8, 2),
    }
    layout = parameters({name: (torch.float32, shape) for name, shape in names.items()}, config)
    assert layout.source.startswith("shapes (")
    assert reason in layout.source
    assert {p.name: (p.kind, p.carrier) for p in layout.parameters} == {
        "tok_embed.weight": (Kind.EMBEDDING, "module"),
        "blocks.10.proj.weight": (Kind.LINEAR, "module"),
        "blocks.9.proj.weight": (Kind.LINEAR, "module"),
        "blocks.9.proj.bias": (Kind.VECTOR, ""),
        "blocks.9.conv.weight": (Kind.CONVOLUTION, "module"),
        "blocks.9.depthwise.weight": (Kind.CONVOLUTION, ""),
        "blocks.9.experts.up_proj": (Kind.EXPERTS, "parameter"),
        "blocks.9.experts.down_proj": (Kind.EXPERTS, "parameter"),
        "blocks.9.cls": (Kind.OTHER, ""),
        "mixer.dt_proj.weight": (Kind.LINEAR, ""),
    }
    order = [p.name for p in layout.parameters]
    assert order.index("blocks.9.proj.weight") < order.index("blocks.10.proj.weight")
    assert order.index("blocks.9.experts.up_proj") < order.index("blocks.9.experts.down_proj")


def test_without_transformers_the_layout_says_so(monkeypatch):
    monkeypatch.setattr("mergekit_lr.checkpoint.layout.find_spec", lambda name: None)
    model = on_meta(T.BertModel, T.BertConfig(**ENCODER))
    layout = parameters(headers(model), config_of(model))
    assert layout.source == "shapes (transformers is not installed)"
    assert util.find_spec("transformers")


class Reader(nn.Module):
    """Calls some of its modules, reads the weights or attributes of others."""

    def __init__(self):
        super().__init__()
        self.called = nn.Linear(2, 2)
        self.taken = nn.Linear(2, 2)
        self.nested = nn.Sequential(nn.Linear(2, 2))
        self.strided = nn.Conv1d(2, 2, 1)
        self.asked = nn.Linear(2, 2)
        self.inner = nn.ModuleDict({"deep": nn.Linear(2, 2)})
        nn.init.zeros_(self.called.weight)

    def forward(self, x):
        if isinstance(self.asked.weight, torch.Tensor) and self.asked.bias is not None:
            x = x.to(self.asked.weight.dtype)
        x = F.linear(x, self.taken.weight) + self.inner.deep.weight.sum()
        return self.asked(self.called(x))[..., :: self.strided.stride[0]]

    def fuse_projections(self):
        return self.called.weight


def test_modules_read_past_their_forward_are_found():
    found = bypassed(nn.Sequential(Reader()))
    assert set(found) == {"0.taken", "0.strided", "0.inner.deep"}
    assert found["0.taken"] == "Reader reads taken.weight itself"
    assert found["0.strided"] == "Reader reads strided.stride itself"


class Scaled(nn.Embedding):
    def __init__(self, scale):
        super().__init__(4, 3)
        self.embed_scale = scale

    def forward(self, ids):
        return super().forward(ids) * self.embed_scale


class Shifted(nn.Embedding):
    def forward(self, ids):
        return super().forward(ids + 1)


class Same(nn.Linear):
    def forward(self, x):
        return x @ self.weight.T + self.bias


class Scored(nn.Linear):
    def forward(self, x):
        return super().forward(x).softmax(-1)


class Stack(nn.Module):
    def __init__(self, **attributes):
        super().__init__()
        self.__dict__.update(attributes)


@pytest.mark.parametrize(
    ("owner", "leaf", "shape", "kind", "carrier"),
    [
        (Same(3, 4), "weight", (4, 3), Kind.LINEAR, "module"),
        (Scored(3, 4), "weight", (4, 3), Kind.LINEAR, ""),
        (Scaled(2.0), "weight", (4, 3), Kind.EMBEDDING, "module"),
        (Scaled(torch.tensor(2.0)), "weight", (4, 3), Kind.EMBEDDING, ""),
        (Scaled(nn.Buffer(torch.tensor(2.0, device="meta"))), "weight", (4, 3), Kind.EMBEDDING, "module"),
        (Scaled(nn.Buffer(torch.ones(3))), "weight", (4, 3), Kind.EMBEDDING, ""),
        (Shifted(4, 3), "weight", (4, 3), Kind.EMBEDDING, ""),
        (nn.Conv2d(4, 4, 3), "weight", (4, 4, 3, 3), Kind.CONVOLUTION, "module"),
        (nn.Conv2d(4, 4, 3, dilation=2), "weight", (4, 4, 3, 3), Kind.CONVOLUTION, ""),
        (nn.Conv2d(4, 4, 3, groups=2), "weight", (4, 2, 3, 3), Kind.CONVOLUTION, ""),
        (nn.ConvTranspose2d(4, 4, 3), "weight", (4, 4, 3, 3), Kind.OTHER, ""),
        (Stack(num_experts=2), "up", (2, 4, 3), Kind.EXPERTS, "parameter"),
        (Stack(num_experts=2, is_transposed=True), "up", (2, 4, 3), Kind.EXPERTS_TRANSPOSED, "parameter"),
        (Stack(), "cls_token", (1, 1, 3), Kind.OTHER, ""),
        (nn.LayerNorm(3), "weight", (3,), Kind.VECTOR, ""),
    ],
)
def test_kinds_come_from_the_module_and_carriers_from_what_it_does(owner, leaf, shape, kind, carrier):
    found = kind_of(owner, leaf, shape)
    assert (found.kind, found.carrier) == (kind, carrier)
    assert bool(found.obstacle) == (not carrier and kind not in (Kind.OTHER, Kind.VECTOR))


def test_a_width_that_meets_the_vocabulary_makes_no_table():
    """A down projection with as many rows as there are tokens is linear all the same."""
    shapes = {
        "model.embed_tokens.weight": (64, 64),
        "model.layers.0.mlp.down_proj.weight": (64, 96),
        "model.layers.0.self_attn.o_proj.weight": (64, 64),
        "model.norm.weight": (64,),
        "lm_head.weight": (64, 64),
    }
    headers = {name: (torch.float32, shape) for name, shape in shapes.items()}
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "vocab_size": 64}
    kinds = {p.name: str(p.kind) for p in parameters(headers, config).parameters}
    assert [name for name, kind in kinds.items() if kind == "embedding"] == ["model.embed_tokens.weight"]
