"""PEFT's adapter types on layers and options beyond the stored cases, against PEFT's own merge, live."""

from __future__ import annotations

import copy
import json
import warnings
from typing import Any, NamedTuple

import peft
import pytest
import torch
from peft.tuners.boft.layer import BOFTLayer
from peft.tuners.waveft.waverec2d import waverec2d
from torch import Tensor, nn

from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.variants import TYPES, open_variant
from mergekit_lr.adapter.variants.boft import butterfly
from mergekit_lr.adapter.variants.site import from_matrix
from mergekit_lr.adapter.variants.waveft import _filters, _swap_details, _synthesis
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, MismatchError, UsageError


class Model(nn.Module):
    """Wide, tall and square layers, with and without bias, and convolutions of two kernels."""

    def __init__(self):
        super().__init__()
        self.wide = nn.Linear(24, 12)
        self.tall = nn.Linear(12, 36, bias=False)
        self.square = nn.Linear(36, 36)
        self.conv = nn.Conv2d(4, 8, 3)
        self.point = nn.Conv2d(8, 6, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.square(self.tall(self.wide(x)))


LINEAR = ["wide", "tall", "square"]
ALL = [*LINEAR, "conv", "point"]
LOW, DENSE = {"low-rank"}, {"dense"}


class Case(NamedTuple):
    """A configuration, and the forms that its changes should come in."""

    config: peft.PeftConfig
    forms: set[str]


def case(config: type, forms: set[str], targets: list[str] = LINEAR, **options: Any) -> Case:
    """A case that does not start from the identity, where the type lets one choose."""
    if "init_weights" in config.__dataclass_fields__:
        options.setdefault("init_weights", False)
    return Case(config(target_modules=targets, **options), forms)


LINES = {"config_A_B": "vector", "config_C": "vector", "config_D_E": "vector"}
CONSTANTS = {"config_A_B": "constant", "config_C": "lora", "config_D_E": "constant"}
CORES = {"use_effective_conv2d": True, "alpha": 3, "alpha_pattern": {"square": 7}}
CASES = {
    "adalora": case(peft.AdaLoraConfig, LOW, init_r=3, lora_alpha=5, total_step=9),
    "beft": case(peft.BeftConfig, DENSE, ["wide", "square"]),
    "boft": case(peft.BOFTConfig, DENSE, ALL, boft_block_size=4),
    "boft by count": case(peft.BOFTConfig, DENSE, boft_block_num=3, boft_block_size=0),
    "c3a": case(peft.C3AConfig, DENSE, block_size=12),
    "delora": case(peft.DeloraConfig, LOW, r=3),
    "fourierft": case(peft.FourierFTConfig, DENSE, n_frequency=20, random_loc_seed=5),
    "glora vectors": case(peft.GloraConfig, DENSE, **LINES),
    "glora constants": case(peft.GloraConfig, DENSE, **CONSTANTS),
    "gralora": case(peft.GraloraConfig, LOW, r=6, gralora_k=3, alpha=5),
    "gralora hybrid": case(peft.GraloraConfig, LOW, r=4, gralora_k=2, hybrid_r=3, alpha=5),
    "hira": case(peft.HiraConfig, DENSE, r=3),
    "hra": case(peft.HRAConfig, LOW, ALL, r=4),
    "hra orthonormal": case(peft.HRAConfig, LOW, ALL, r=4, apply_GS=True),
    "ia3": case(peft.IA3Config, DENSE, ALL, feedforward_modules=["tall", "conv"]),
    "loha": case(peft.LoHaConfig, LOW, ALL, r=2, alpha=3),
    "loha cores, patterns": case(peft.LoHaConfig, LOW, ALL, r=2, rank_pattern={"tall": 3}, **CORES),
    "lokr": case(peft.LoKrConfig, LOW, ALL, r=1, alpha=3),
    "lokr in full": case(peft.LoKrConfig, DENSE, ALL, r=9, alpha=3),
    "lokr cores, patterns": case(
        peft.LoKrConfig, LOW, ALL, r=1, rank_pattern={"square": 2}, decompose_both=True, **CORES
    ),
    "miss, ragged": case(peft.MissConfig, LOW, r=5, init_weights=True),
    "oft by inverse": case(peft.OFTConfig, DENSE, ALL, oft_block_size=4, use_cayley_neumann=False),
    "oft, two terms": case(peft.OFTConfig, DENSE, oft_block_size=6, num_cayley_neumann_terms=2),
    "osf": case(peft.OSFConfig, DENSE, effective_rank=5),
    "psoft by inverse": case(peft.PsoftConfig, LOW, r=4, use_cayley_neumann=False, ab_svd_init="pissa_init"),
    "psoft in a ball": case(
        peft.PsoftConfig, LOW, r=4, psoft_mag_a=False, use_cayley_neumann=True, cayley_neumann_eps=0.1
    ),
    "pvera": case(peft.PveraConfig, LOW, r=4, save_projection=True),
    "randlora": case(peft.RandLoraConfig, DENSE, r=5),
    "randlora, sparse": case(peft.RandLoraConfig, DENSE, r=5, sparse=True),
    "road_1": case(peft.RoadConfig, DENSE, variant="road_1", group_size=4),
    "road_4": case(peft.RoadConfig, DENSE, variant="road_4", group_size=4),
    "shira": case(peft.ShiraConfig, DENSE, r=2),
    "vblora": case(peft.VBLoRAConfig, LOW, r=2, num_vectors=7, vector_length=6, topk=3),
    "vera": case(peft.VeraConfig, LOW, r=4),
    "waveft db2": case(peft.WaveFTConfig, DENSE, n_frequency=30, wavelet_family="db2"),
    "waveft sym3": case(peft.WaveFTConfig, DENSE, n_frequency=30, wavelet_family="sym3"),
    "waveft direct": case(peft.WaveFTConfig, DENSE, n_frequency=30, use_idwt=False),
    "pissa": case(peft.LoraConfig, LOW, r=3, lora_alpha=5, init_lora_weights="pissa"),
    "olora": case(peft.LoraConfig, LOW, r=3, lora_alpha=3, init_lora_weights="olora"),
}


def trained(config: peft.PeftConfig) -> tuple[dict[str, Tensor], dict[str, Tensor], dict[str, Tensor]]:
    """(base weights, adapter tensors as saved, merged weights) of a model whose adapter moved from its start."""
    torch.manual_seed(0)
    model = Model()
    base = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(model, copy.deepcopy(config)).eval()
        with torch.no_grad():
            for parameter in wrapped.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        saved = {key: tensor.clone() for key, tensor in peft.get_peft_model_state_dict(wrapped).items()}
        merged = wrapped.merge_and_unload().state_dict()
    return base, saved, merged


def fields_of(config: peft.PeftConfig) -> dict[str, Any]:
    """The configuration as its JSON file has it."""
    return json.loads(json.dumps(config.to_dict(), default=list))


def layout(base: dict[str, Tensor]) -> dict[str, Parameter]:
    kinds = {1: Kind.VECTOR, 2: Kind.LINEAR, 4: Kind.CONVOLUTION}
    return {name: Parameter(name, kinds[tensor.ndim], tuple(tensor.shape), ()) for name, tensor in base.items()}


@pytest.mark.parametrize("name", CASES)
def test_changes_are_what_peft_merges(name: str):
    config, wanted = CASES[name]
    base, saved, merged = trained(config)
    variant = open_variant(saved, fields_of(config), layout(base), read=lambda parameter: base[parameter.name])
    ours = {name: tensor.clone() for name, tensor in base.items()}
    forms: set[str] = set()
    for name, delta in variant.deltas():
        forms |= LOW if isinstance(delta, LowRank) else DENSE
        matrix = delta.dense() if isinstance(delta, LowRank) else delta
        ours[name] += from_matrix(matrix, variant.parameters[name].kind, ours[name].shape)
    assert forms == wanted
    changed = {name for name in base if not torch.equal(merged[name], base[name])}
    assert changed, "PEFT's merge changes nothing, so this compares nothing"
    for name in base:
        torch.testing.assert_close(ours[name], merged[name], rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("family", ["db1", "db2", "db5", "sym4", "coif1"])
def test_wavelet_synthesis_is_separable(family: str):
    plane = torch.randn(14, 20)
    low, high = _filters(family)
    (a, b), (c, d) = (half.tensor_split(2, dim=1) for half in plane.tensor_split(2, dim=0))
    wanted = waverec2d((a, (b, c, d)), family)
    rows, columns = _synthesis(14, low.float(), high.float()), _synthesis(20, low.float(), high.float())
    torch.testing.assert_close(rows @ _swap_details(plane) @ columns.T, wanted, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("width", "blocks", "size"), [(24, 6, 4), (16, 4, 4), (32, 4, 8)])
def test_butterfly_order(width: int, blocks: int, size: int):
    """The permutations of a BOFT of several factors, which PEFT runs on CUDA only."""
    for index in range(2):
        count = blocks // 2**index
        wanted = BOFTLayer.block_butterfly_perm(None, width, count, size // 2, 1)  # pyright: ignore[reportArgumentType]
        assert torch.equal(butterfly(width, count, size // 2), wanted)


def test_every_type_is_covered():
    """A type without a case here or among the stored ones would be a claim without a check."""
    here = {str(config.peft_type.value) for config, _ in CASES.values() if config.peft_type}
    stored = {"FROD", "SUPERTUNING", "TINYLORA"}
    assert set(TYPES) - {"BONE"} == (here | stored) - {"LORA"}


WIDE = "base_model.model.wide"


def test_needing_the_base_is_said():
    base, saved, _ = trained(CASES["ia3"][0])
    variant = open_variant(saved, fields_of(CASES["ia3"][0]), layout(base))
    with pytest.raises(UsageError, match="IA3 adapter changes the base's own weight: give the base"):
        list(variant.deltas())


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        (lambda t, c: c.update(peft_type="PROMPT_TUNING"), FormatError, "type PROMPT_TUNING has no weight changes"),
        (lambda t, c: c.update(peft_type="LORA"), FormatError, "type LORA has no weight changes that can be read here"),
        (
            lambda t, c: t.update({f"{WIDE}.mystery": torch.ones(1)}),
            FormatError,
            "tensor base_model.model.wide.mystery is not understood.*module wide has no such part",
        ),
        (
            lambda t, c: t.update({"base_model.model.else.hada_w1_a": torch.ones(1)}),
            FormatError,
            "its module is not in the base",
        ),
        (lambda t, c: t.pop(f"{WIDE}.hada_w2_a"), FormatError, "wide: the adapter has no tensor hada_w2_a"),
        (
            lambda t, c: t.update({f"{WIDE}.bias": torch.ones(5)}),
            MismatchError,
            r"has shape \[5\], the base's wide.bias has \[12\]",
        ),
        (
            lambda t, c: t.update({f"{WIDE}.hada_w{i}_a": torch.ones(3, 2) for i in "12"}),
            MismatchError,
            "belongs to another base",
        ),
    ],
)
def test_what_does_not_fit_is_refused_by_name(change, error, message: str):
    config = CASES["loha"][0]
    base, saved, _ = trained(config)
    fields = fields_of(config)
    change(saved, fields)
    with pytest.raises(error, match=message):
        list(open_variant(saved, fields, layout(base)).deltas())
