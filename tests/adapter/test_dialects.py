"""Image models' adapter files, against the loaders and the models that they are made for.

A file is right when the model gives the same outputs whether diffusers loads it or the deltas read from it are
added to the weights; both ways are compared on tiny models with random weights.
"""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from mergekit_lr.adapter import underscores
from mergekit_lr.adapter.adapter import AdaptedWeight, Adapter
from mergekit_lr.adapter.comfy import open_comfy, save_comfy
from mergekit_lr.adapter.detect import detect
from mergekit_lr.adapter.diffusers import open_diffusers, save_diffusers
from mergekit_lr.adapter.kohya import open_kohya, save_kohya
from mergekit_lr.adapter.lowrank import LowRank
from mergekit_lr.adapter.lycoris import open_lycoris, save_lycoris
from mergekit_lr.adapter.variants.dora import rescaled
from mergekit_lr.adapter.variants.site import from_matrix
from mergekit_lr.checkpoint.parameter import Kind, Parameter
from mergekit_lr.errors import FormatError, MismatchError, UsageError

TARGETS = ["to_q", "to_v", "to_out.0", "proj_in", "conv1", "ff.net.0.proj", "time_emb_proj"]


@pytest.fixture(scope="module")
def unet():
    """A UNet of 85 layers that fits in a few kilobytes."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 16),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
    ).eval()


def output(unet: nn.Module) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    image, text = torch.randn(1, 4, 8, 8, generator=generator), torch.randn(1, 3, 8, generator=generator)
    with torch.no_grad():
        return unet(image, 3, text).sample


def copy_of(unet: nn.Module) -> nn.Module:
    from diffusers import UNet2DConditionModel

    fresh = UNet2DConditionModel.from_config(unet.config).eval()
    fresh.load_state_dict({name: tensor.clone() for name, tensor in unet.state_dict().items()})
    return fresh


def random_adapter(unet: nn.Module, ranks=(2, 3), scaling: float | None = 0.5, seed: int = 0) -> Adapter:
    """Factors for every target, of the ranks in turn, linear layers and convolutions."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in unet.state_dict().items():
        module = name.rpartition(".")[0]
        if name.endswith(".weight") and any(module.endswith(target) for target in TARGETS):
            rank = ranks[len(weights) % len(ranks)]
            A = torch.randn(rank, tensor[0].numel(), generator=generator) / 4
            B = torch.randn(len(tensor), rank, generator=generator) / 4
            kind = Kind.LINEAR if tensor.ndim == 2 else Kind.CONVOLUTION
            weights[f"unet.{name}"] = AdaptedWeight(kind, LowRank(A, B, scaling or rank / 4), tuple(tensor.shape))
    assert {weight.kind for weight in weights.values()} == {Kind.LINEAR, Kind.CONVOLUTION}
    return Adapter(weights)


def applied(unet: nn.Module, adapter: Adapter) -> nn.Module:
    """The model with the adapter's deltas added to its weights."""
    state = {name: tensor.clone() for name, tensor in unet.state_dict().items()}
    for name, weight in adapter.weights.items():
        own = name.partition(".")[2]
        delta: LowRank | Tensor = weight.delta
        if weight.magnitude is not None:
            delta = rescaled(state[own].flatten(1), delta, weight.magnitude)
        matrix = delta.dense() if isinstance(delta, LowRank) else delta
        state[own] = state[own] + from_matrix(matrix, weight.kind, state[own].shape)
    for name, difference in adapter.added.items():
        state[name.partition(".")[2]] += difference
    fresh = copy_of(unet)
    fresh.load_state_dict(state)
    return fresh


def loaded_by_diffusers(unet: nn.Module, file: Path) -> nn.Module:
    """The model with the file loaded as StableDiffusionPipeline.load_lora_weights does it."""
    from diffusers import StableDiffusionPipeline

    fresh = copy_of(unet)
    state, alphas, metadata = StableDiffusionPipeline.lora_state_dict(str(file), return_lora_metadata=True)
    assert not any("dora_scale" in key for key in load_file(file))
    StableDiffusionPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=fresh, metadata=metadata)
    return fresh


def assert_same_model(one: nn.Module, two: nn.Module, unet: nn.Module) -> None:
    got, wanted = output(one), output(two)
    effect = (wanted - output(unet)).norm() / wanted.norm()
    assert effect > 1e-2, "the adapter does next to nothing, so this compares nothing"
    assert (got - wanted).norm() / wanted.norm() < 1e-5


def assert_same_adapter(one: Adapter, two: Adapter) -> None:
    """Bit for bit the same factors where the scale is the same, and the same deltas everywhere."""
    assert one.weights.keys() == two.weights.keys()
    assert one.added.keys() == two.added.keys()
    for name, weight in one.weights.items():
        other = two.weights[name]
        assert (weight.kind, weight.shape) == (other.kind, other.shape)
        assert torch.equal(weight.delta.A, other.delta.A)
        if weight.delta.scaling == pytest.approx(other.delta.scaling, rel=1e-6):
            assert torch.equal(weight.delta.B, other.delta.B)
        else:  # the scale moved into B
            torch.testing.assert_close(weight.delta.dense(), other.delta.dense(), rtol=1e-6, atol=1e-7)
    for name, tensor in one.added.items():
        assert torch.equal(tensor, two.added[name])


@pytest.mark.parametrize("scaling", [1.0, 0.5, None])
def test_kohya_file_means_to_diffusers_what_it_means_here(unet, tmp_path, scaling):
    adapter = random_adapter(unet, scaling=scaling)
    file = tmp_path / "kohya.safetensors"
    save_kohya(adapter, file)
    assert detect(load_file(file)) == "kohya"
    back = open_kohya(file)
    assert_same_adapter(back, adapter)
    assert len({round(weight.delta.scaling * weight.delta.rank, 5) for weight in back.weights.values()}) == 1
    assert_same_model(loaded_by_diffusers(unet, file), applied(unet, back), unet)


@pytest.mark.parametrize("ranks", [(2,), (2, 3)])
def test_diffusers_file_means_to_diffusers_what_it_means_here(unet, tmp_path, ranks):
    adapter = random_adapter(unet, ranks)
    file = tmp_path / "pytorch_lora_weights.safetensors"
    save_diffusers(adapter, file)
    assert detect(load_file(file)) == "diffusers"
    back = open_diffusers(file)
    assert back.weights.keys() == adapter.weights.keys()
    assert_same_model(applied(unet, back), applied(unet, adapter), unet)
    assert_same_model(loaded_by_diffusers(unet, file), applied(unet, back), unet)


def test_half_precision_factors_keep_every_bit_and_their_own_alphas(unet, tmp_path):
    adapter = random_adapter(unet, scaling=None)
    halves = {name: replace(weight, delta=weight.delta.to(torch.float16)) for name, weight in adapter.weights.items()}
    save_kohya(Adapter(halves), tmp_path / "half.safetensors")
    back = open_kohya(tmp_path / "half.safetensors")
    assert len({weight.delta.scaling for weight in back.weights.values()}) == 2
    assert_same_adapter(back, Adapter(halves))


def test_what_diffusers_trained_and_saved_is_read(unet, tmp_path):
    """rank_pattern, alpha_pattern and rsLoRA are in the metadata alone; then our own file says the same."""
    from diffusers import StableDiffusionPipeline
    from diffusers.training_utils import _collate_lora_metadata
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict

    trained = copy_of(unet)
    torch.manual_seed(2)
    config = LoraConfig(
        r=2,
        lora_alpha=3,
        target_modules=TARGETS,
        rank_pattern={"to_q": 4},
        alpha_pattern={"conv1": 1},
        use_rslora=True,
        init_lora_weights=False,
    )
    trained.add_adapter(config)
    layers = get_peft_model_state_dict(trained)
    for as_pipeline in (True, False):
        if as_pipeline:
            facts = _collate_lora_metadata({"unet": trained})
            StableDiffusionPipeline.save_lora_weights(tmp_path, unet_lora_layers=layers, **facts)
        else:
            trained.save_lora_adapter(tmp_path)
        file = tmp_path / "pytorch_lora_weights.safetensors"
        assert detect(load_file(file)) == "diffusers"
        adapter = open_diffusers(file)
        assert_same_model(applied(unet, adapter), trained, unet)
        ours = tmp_path / "ours.safetensors"
        save_diffusers(adapter, ours)
        assert_same_model(loaded_by_diffusers(unet, ours), trained, unet)


def test_older_diffusers_words(unet, tmp_path):
    """Adapters beside the layers they change, with and without the component in front."""
    modules = [f"down_blocks.0.attentions.0.transformer_blocks.0.attn{i}" for i in (1, 2)]
    tensors, torch_state = {}, torch.Generator().manual_seed(3)
    for module in modules:
        for layer, own in (("to_q_lora", "to_q"), ("to_out_lora", "to_out.0")):
            d_out, d_in = unet.get_submodule(f"{module}.{own}").weight.shape
            tensors[f"unet.{module}.processor.{layer}.down.weight"] = torch.randn(2, d_in, generator=torch_state)
            tensors[f"unet.{module}.processor.{layer}.up.weight"] = torch.randn(d_out, 2, generator=torch_state)
    file = tmp_path / "old.safetensors"
    save_file(tensors, file)
    adapter = open_diffusers(file)
    assert set(adapter.weights) == {f"unet.{m}.{own}.weight" for m in modules for own in ("to_q", "to_out.0")}
    assert_same_model(loaded_by_diffusers(unet, file), applied(unet, adapter), unet)
    bare = {key.removeprefix("unet."): tensor for key, tensor in tensors.items()}
    assert detect(bare) == "diffusers"
    assert_same_adapter(open_diffusers(bare), adapter)
    text = {"text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight": torch.ones(1, 4)}
    text |= {"text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.up.weight": torch.ones(4, 1)}
    assert list(open_diffusers(text).weights) == ["text_encoder.text_model.encoder.layers.0.self_attn.out_proj.weight"]


def test_one_file_through_all_dialects(unet, tmp_path):
    """kohya -> diffusers -> LyCORIS -> kohya: the model's outputs stay."""
    adapter = random_adapter(unet)
    wanted = applied(unet, adapter)
    steps = [(save_kohya, open_kohya), (save_diffusers, open_diffusers), (save_lycoris, open_lycoris)]
    for number, (save, open_) in enumerate(steps):
        file = tmp_path / f"{number}.safetensors"
        save(adapter, file)
        adapter = open_(file)
        assert_same_model(applied(unet, adapter), wanted, unet)


def test_comfy_file_keeps_every_bit(tmp_path):
    A, B = torch.randn(2, 8).bfloat16(), torch.randn(24, 2).bfloat16()
    name = "diffusion_model.double_blocks.0.img_attn.qkv"
    adapter = Adapter(
        {f"{name}.weight": AdaptedWeight(Kind.LINEAR, LowRank(A, B, 0.5), (24, 8), magnitude=torch.rand(24))},
        added={f"{name}.bias": torch.randn(24)},
        metadata={"modelspec.title": "mine"},
    )
    file = tmp_path / "comfy.safetensors"
    save_comfy(adapter, file)
    tensors = load_file(file)
    assert detect(tensors) == "comfy"
    assert set(tensors) == {
        f"{name}.{part}" for part in ("lora_A.weight", "lora_B.weight", "alpha", "dora_scale", "diff_b")
    }
    back = open_comfy(file)
    assert_same_adapter(back, adapter)
    assert torch.equal(back.weights[f"{name}.weight"].magnitude, adapter.weights[f"{name}.weight"].magnitude)
    assert back.metadata == {"modelspec.title": "mine"}
    with pytest.raises(UsageError, match="save as diffusers"):
        save_comfy(Adapter({"unet.proj.weight": adapter.weights[f"{name}.weight"]}), file)


def lycoris_parts() -> dict[str, tuple[dict[str, Tensor], Tensor]]:
    """LyCORIS tensors by kind, each with the delta that its definition gives."""
    torch.manual_seed(4)
    r = 2
    a1, b1, a2, b2 = torch.randn(6, r), torch.randn(r, 8), torch.randn(6, r), torch.randn(r, 8)
    t1, t2 = torch.randn(r, r, 3, 3), torch.randn(r, r, 3, 3)
    w1, w2 = torch.randn(3, 2), torch.randn(2, 4)
    core = torch.randn(r, r, 3, 3)
    alpha, scale = torch.tensor(3.0), 3.0 / r
    tucker = "ijkl,ip,jr->prkl"
    hada = {"hada_w1_a": a1, "hada_w1_b": b1, "hada_w2_a": a2, "hada_w2_b": b2, "alpha": alpha}
    cored = hada | {"hada_w1_a": a1.T.clone(), "hada_w2_a": a2.T.clone(), "hada_t1": t1, "hada_t2": t2}
    return {
        "locon": (
            {"lora_up.weight": a1[..., None, None], "lora_down.weight": b1[..., None, None], "lora_mid.weight": core,
             "alpha": alpha},
            torch.einsum("op,pqkl,qi->oikl", a1, core, b1) * scale,
        ),
        "loha": (hada, (a1 @ b1) * (a2 @ b2) * scale),
        "loha with cores": (cored, torch.einsum(tucker, t1, a1.T, b1) * torch.einsum(tucker, t2, a2.T, b2) * scale),
        "lokr": ({"lokr_w1": w1, "lokr_w2_a": w2[:, :1], "lokr_w2_b": w2[:1], "alpha": alpha},
                 torch.kron(w1, w2[:, :1] @ w2[:1]) * 3.0),
        "lokr in full": ({"lokr_w1": w1, "lokr_w2": w2, "alpha": alpha}, torch.kron(w1, w2)),
        "lokr convolution": (
            {"lokr_w1": w1, "lokr_w2": torch.ones(2, 4, 3, 3)},
            torch.kron(w1[:, :, None, None], torch.ones(2, 4, 3, 3)),
        ),
        "difference": ({"diff": torch.ones(6, 8)}, torch.ones(6, 8)),
    }  # fmt: skip


@pytest.mark.parametrize("kind", lycoris_parts())
def test_lycoris_tensors_mean_what_their_definition_says(kind: str, tmp_path):
    parts, wanted = lycoris_parts()[kind]
    file = tmp_path / "lycoris.safetensors"
    save_file({f"lora_unet_mid_block_conv.{part}": tensor.contiguous() for part, tensor in parts.items()}, file)
    assert detect(load_file(file)) == "lycoris"
    name = "unet.mid_block.conv.weight"

    def delta(adapter: Adapter) -> Tensor:
        if name in adapter.added:
            return adapter.added[name]
        weight = adapter.weights[name]
        assert weight.shape == wanted.shape
        return from_matrix(weight.delta.dense(), weight.kind, wanted.shape)

    first = open_lycoris(file)
    torch.testing.assert_close(delta(first), wanted)
    save_lycoris(first, tmp_path / "again.safetensors")
    again = open_lycoris(tmp_path / "again.safetensors")
    torch.testing.assert_close(delta(again), wanted)
    assert_same_adapter(again, first)


@pytest.mark.parametrize("shape", [(6, 8), (6, 4, 3, 3)])
@pytest.mark.parametrize("rows", [True, False])
def test_dora_scale_of_rows_and_of_input_channels(shape, rows, tmp_path):
    """W' = (W + D) m / |W + D|, along either axis."""
    torch.manual_seed(5)
    weight, axes = torch.randn(shape), tuple(i for i in range(len(shape)) if i != (0 if rows else 1))
    scale = torch.rand([n if i not in axes else 1 for i, n in enumerate(shape)]) + 0.5
    A, B = torch.randn(2, *shape[1:]), torch.randn(6, 2, *(1 for _ in shape[2:]))
    adapted = weight + torch.einsum("or,ri...->oi...", B.flatten(1), A)
    wanted = adapted * scale / adapted.square().sum(axes, keepdim=True).sqrt()
    parts = {"lora_down.weight": A, "lora_up.weight": B, "dora_scale": scale}
    first = open_lycoris({f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()})
    save_lycoris(first, tmp_path / "dora.safetensors")
    for adapter in (first, open_lycoris(tmp_path / "dora.safetensors")):
        change = adapter.weights["unet.conv_in.weight"]
        delta = rescaled(weight.flatten(1), change.delta, change.magnitude)
        torch.testing.assert_close(weight + delta.reshape(shape), wanted)
    assert load_file(tmp_path / "dora.safetensors")["lora_unet_conv_in.dora_scale"].shape == scale.shape


def test_dora_whose_lengths_stay_is_the_low_rank_delta_itself():
    delta = LowRank(torch.zeros(1, 3), torch.zeros(2, 1))
    weight = torch.tensor([[3.0, 4.0, 0.0], [0.0, 0.0, 2.0]])
    assert rescaled(weight, delta, torch.tensor([5.0, 2.0])) is delta
    with pytest.raises(MismatchError, match="magnitude"):
        rescaled(weight, delta, torch.ones(5))


def test_names_of_real_models_survive_underscores(unet):
    """Every layer of a UNet, of Flux, of SD3 and of CLIP is found again without the base."""
    from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
    from transformers import CLIPTextConfig, CLIPTextModel

    with torch.device("meta"):
        flux = FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)
        sd3 = SD3Transformer2DModel(num_layers=1)
        text = CLIPTextModel(CLIPTextConfig(num_hidden_layers=1))
    for model in (unet, flux, sd3, text):
        layers = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | nn.Conv2d)]
        assert len(layers) > 5
        for name in layers:
            assert underscores.read(name.replace(".", "_")) == name
    original = ["input_blocks.4.1.transformer_blocks.0.attn1.to_out.0", "double_blocks.3.img_attn.qkv", "label_emb.0.2"]
    for name in original:
        assert underscores.read(name.replace(".", "_")) == name


def test_the_base_decides_where_the_dots_were():
    """Names that no grammar knows, and names that the grammar reads otherwise."""
    names = ["my_odd.block_0.to_q", "double_blocks.0.img_attn_qkv"]
    base = {f"{name}.weight": Parameter(f"{name}.weight", Kind.LINEAR, (4, 3), ()) for name in names}
    pair = {"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(4, 1)}
    tensors = {f"lora_unet_{name.replace('.', '_')}.{part}": tensor for name in names for part, tensor in pair.items()}
    assert set(open_kohya(tensors, base=base).weights) == {f"diffusion_model.{name}.weight" for name in names}
    with pytest.raises(FormatError, match="give the base model"):
        open_kohya(tensors)
    with pytest.raises(FormatError, match="no module that lora_unet_my_odd_block_0_to_q"):
        open_kohya(tensors, base={"other.weight": base["my_odd.block_0.to_q.weight"]})
    with pytest.raises(MismatchError, match=r"shape \[4, 3\], the base's .* \[4, 5\]"):
        open_kohya(tensors, base={name: replace(parameter, shape=(4, 5)) for name, parameter in base.items()})
    twins = dict.fromkeys(("a.b_c.weight", "a_b.c.weight"), base[f"{names[0]}.weight"])
    with pytest.raises(FormatError, match="same name once dots are underscores"):
        open_kohya(tensors, base=twins)


def test_a_base_without_components_checks_its_own_part(unet, tmp_path):
    """A UNet's own parameters say unet, shape and kind for every dialect; the text encoder's modules stay unchecked."""
    kinds = {1: Kind.VECTOR, 2: Kind.LINEAR, 4: Kind.CONVOLUTION}
    base = {
        name: Parameter(name, kinds[tensor.ndim], tuple(tensor.shape), ()) for name, tensor in unet.state_dict().items()
    }
    adapter = random_adapter(unet)
    text = AdaptedWeight(Kind.LINEAR, LowRank(torch.ones(2, 3), torch.ones(4, 2), 0.5), (4, 3))
    adapter.weights["text_encoder.text_model.encoder.layers.0.mlp.fc1.weight"] = text
    for save, open_ in ((save_kohya, open_kohya), (save_diffusers, open_diffusers)):
        file = tmp_path / f"{open_.__name__}.safetensors"
        save(adapter, file)
        assert open_(file, base=base).weights.keys() == adapter.weights.keys()
        with pytest.raises((FormatError, MismatchError), match="the base has no module"):
            open_(file, base={"conv_in.weight": base["conv_in.weight"], "mid_block.x.weight": base["conv_in.weight"]})


def test_which_model_it_is_holds_for_all_its_modules():
    """x_embedder alone could be anyone's; beside transformer_blocks it is diffusers' transformer."""
    pair = {"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(4, 1)}
    for neighbour, component in [
        ("transformer_blocks.0.attn.to_q", "transformer"),
        ("double_blocks.0.img_attn.qkv", "diffusion_model"),
    ]:
        names = [neighbour, "x_embedder"]
        tensors = {f"lora_unet_{name.replace('.', '_')}.{part}": t for name in names for part, t in pair.items()}
        assert set(open_kohya(tensors).weights) == {f"{component}.{name}.weight" for name in names}


def test_a_pickled_file_is_read_as_tensors_alone(unet, tmp_path):
    adapter = random_adapter(unet)
    save_kohya(adapter, tmp_path / "kohya.safetensors")
    torch.save(load_file(tmp_path / "kohya.safetensors"), tmp_path / "kohya.pt")
    assert_same_adapter(open_kohya(tmp_path / "kohya.pt"), adapter)
    torch.save({"run": print}, tmp_path / "code.pt")
    with pytest.raises(FormatError, match="not readable as tensors alone"):
        open_kohya(tmp_path / "code.pt")


@pytest.fixture(scope="module")
def xl_unet():
    """A UNet with SDXL's levels: two layers each, attention from the second on, added conditions."""
    from diffusers import UNet2DConditionModel

    torch.manual_seed(1)
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(8, 8, 16),
        layers_per_block=2,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        cross_attention_dim=8,
        norm_num_groups=4,
        attention_head_dim=4,
        use_linear_projection=True,
    ).eval()


def test_original_unet_names_become_diffusers_own(xl_unet, tmp_path):
    """Every kind of block of a kohya SDXL file, as diffusers' loader translates it and as it is done here."""
    from diffusers import StableDiffusionXLPipeline

    places = {
        "input_blocks.0.0": "conv_in",
        "input_blocks.2.0.in_layers.2": "down_blocks.0.resnets.1.conv1",
        "input_blocks.3.0.op": "down_blocks.0.downsamplers.0.conv",
        "input_blocks.4.0.emb_layers.1": "down_blocks.1.resnets.0.time_emb_proj",
        "input_blocks.5.1.transformer_blocks.0.attn1.to_out.0": (
            "down_blocks.1.attentions.1.transformer_blocks.0.attn1.to_out.0"
        ),
        "input_blocks.7.0.skip_connection": "down_blocks.2.resnets.0.conv_shortcut",
        "middle_block.0.out_layers.3": "mid_block.resnets.0.conv2",
        "middle_block.1.proj_in": "mid_block.attentions.0.proj_in",
        "middle_block.2.in_layers.2": "mid_block.resnets.1.conv1",
        "output_blocks.2.2.conv": "up_blocks.0.upsamplers.0.conv",
        "output_blocks.4.1.transformer_blocks.0.ff.net.0.proj": (
            "up_blocks.1.attentions.1.transformer_blocks.0.ff.net.0.proj"
        ),
        "output_blocks.8.0.in_layers.2": "up_blocks.2.resnets.2.conv1",
        "time_embed.2": "time_embedding.linear_2",
        "out.2": "conv_out",
    }
    generator, weights = torch.Generator().manual_seed(6), {}
    for original, ours in places.items():
        tensor = xl_unet.get_submodule(ours).weight
        A = torch.randn(2, tensor[0].numel(), generator=generator) / 4
        B = torch.randn(len(tensor), 2, generator=generator) / 4
        kind = Kind.LINEAR if tensor.ndim == 2 else Kind.CONVOLUTION
        weights[f"diffusion_model.{original}.weight"] = AdaptedWeight(kind, LowRank(A, B, 0.5), tuple(tensor.shape))
    file, ours_file = tmp_path / "kohya.safetensors", tmp_path / "diffusers.safetensors"
    save_kohya(Adapter(weights), file)
    adapter = open_kohya(file)
    assert adapter.weights.keys() == weights.keys()
    save_diffusers(adapter, ours_file)
    back = open_diffusers(ours_file)
    assert set(back.weights) == {f"unet.{ours}.weight" for ours in places.values()}
    wanted = applied(xl_unet, back)
    assert_same_model(loaded_by_diffusers(xl_unet, ours_file), wanted, xl_unet)
    theirs = copy_of(xl_unet)
    state, alphas = StableDiffusionXLPipeline.lora_state_dict(str(file), unet_config=xl_unet.config)
    StableDiffusionXLPipeline.load_lora_into_unet(state, network_alphas=alphas, unet=theirs)
    assert_same_model(theirs, wanted, xl_unet)
    odd = Adapter({"diffusion_model.input_blocks.1.0.mystery.weight": weights["diffusion_model.out.2.weight"]})
    with pytest.raises(UsageError, match=r"input_blocks\.1\.0\.mystery: a Stable Diffusion UNet has no such module"):
        save_diffusers(odd, tmp_path / "odd.safetensors")


def test_metadata_is_kept_and_hashes_are_true(unet, tmp_path):
    adapter = replace(random_adapter(unet), metadata={"ss_base_model_version": "sd_v1", "ss_network_dim": "99"})
    file = tmp_path / "kohya.safetensors"
    save_kohya(adapter, file)
    with safe_open(file, "pt") as opened:
        metadata = opened.metadata()
    data = file.read_bytes()
    body = data[8 + int.from_bytes(data[:8], "little") :]
    assert metadata["sshs_model_hash"] == hashlib.sha256(body).hexdigest()
    assert len(metadata["sshs_legacy_hash"]) == 8
    assert metadata["ss_base_model_version"] == "sd_v1"
    assert metadata["ss_network_dim"] == "Dynamic"
    assert metadata["ss_network_alpha"] == "1"
    assert open_kohya(file).metadata == metadata
    assert [path.name for path in tmp_path.iterdir()] == ["kohya.safetensors"]


@pytest.mark.parametrize(
    ("dialect", "keys"),
    {
        "peft": ["base_model.model.model.layers.0.q_proj.lora_A.weight"],
        "kohya": ["lora_unet_mid_block_attentions_0_proj_in.lora_down.weight", "lora_te1_text_model_encoder.alpha"],
        "lycoris": ["lora_unet_mid_block_attentions_0_proj_in.hada_w1_a", "lora_te_text_model.lora_down.weight"],
        "diffusers": ["transformer.transformer_blocks.0.attn.to_q.lora_A.weight", "text_encoder.x.lora_B.weight"],
        "comfy": ["diffusion_model.double_blocks.0.img_attn.qkv.lora_down.weight"],
    }.items(),
)
def test_detection(dialect: str, keys: list[str]):
    assert detect(keys) == dialect


def test_peft_without_its_prefix_is_still_peft():
    assert detect(["model.layers.0.q_proj.lora_A.weight"]) == "peft"
    assert detect(["whatever"], {"peft_type": "VERA"}) == "peft"


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ([], "holds no tensors"),
        (["model.layers.0.q_proj.weight"], "tensor model.layers.0.q_proj.weight is in no known adapter dialect"),
        (
            ["lora_unet_x.lora_down.weight", "diffusion_model.x.lora_A.weight"],
            r"mixes dialects.*diffusion_model.x.lora_A.weight \(comfy\), lora_unet_x.lora_down.weight \(kohya\)",
        ),
    ],
)
def test_what_is_no_adapter_is_named(keys: list[str], message: str):
    with pytest.raises(FormatError, match=message):
        detect(keys)


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"lora_down.weight": torch.ones(1, 3)}, "but no B"),
        ({"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(4, 2)}, "different ranks, 1 and 2"),
        ({"lora_down.weight": torch.ones(1, 3), "lora_up.weight": torch.ones(4, 1, 1, 1)}, "are no LoRA"),
        (
            {"lora_down.weight": torch.ones(1, 3), "oft_blocks": torch.ones(2, 2)},
            "conv_in.oft_blocks is not understood",
        ),
        ({"alpha": torch.tensor(1.0)}, "holds alpha, which is not one adapter"),
        ({"diff": torch.ones(4, 3), "lora_up.weight": torch.ones(4, 1)}, "holds B, diff, which is not one adapter"),
        ({"diff": torch.ones(4, 3), "dora_scale": torch.ones(4, 1)}, "holds diff, magnitude, which is not one adapter"),
        ({"lokr_w1": torch.ones(2, 2), "hada_w1_a": torch.ones(4, 1)}, "which is not one adapter"),
        ({"lokr_w1": torch.ones(2, 2)}, "has lokr_w1 but no lokr_w2_a, lokr_w2_b"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(parts: dict[str, Tensor], message: str):
    with pytest.raises(FormatError, match=message):
        open_lycoris({f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()})


@pytest.mark.parametrize("kind", ["lokr in full", "lokr", "loha", "difference"])
def test_another_base_is_refused(kind: str):
    parts, wanted = lycoris_parts()[kind]
    tensors = {f"lora_unet_conv_in.{part}": tensor for part, tensor in parts.items()}
    for shape, fits in [(tuple(wanted.shape), True), ((7, 5), False)]:
        base = {"conv_in.weight": Parameter("conv_in.weight", Kind.LINEAR, shape, ())}
        if fits:
            assert len({**open_lycoris(tensors, base=base).weights, **open_lycoris(tensors, base=base).added}) == 1
        else:
            with pytest.raises(MismatchError, match="belongs to another base"):
                open_lycoris(tensors, base=base)


def test_rescaled_full_kronecker_product(tmp_path):
    """A dense change with DoRA lengths is kept exactly, beside an identity."""
    torch.manual_seed(7)
    w1, w2, scale, weight = torch.randn(2, 2), torch.randn(3, 4), torch.rand(6, 1), torch.randn(6, 8)
    parts = {"lokr_w1": w1, "lokr_w2": w2, "dora_scale": scale}
    change = open_lycoris({f"lora_unet_conv_in.{p}": t for p, t in parts.items()}).weights["unet.conv_in.weight"]
    adapted = weight + torch.kron(w1, w2)
    wanted = adapted * scale / adapted.norm(dim=1, keepdim=True)
    torch.testing.assert_close(weight + rescaled(weight, change.delta, change.magnitude), wanted)


def test_nothing_is_lost_in_silence(tmp_path):
    """What a dialect has no place for stops the save, and leaves no file behind."""
    weight = AdaptedWeight(Kind.LINEAR, LowRank(torch.ones(1, 3), torch.ones(4, 1)), (4, 3))
    file = tmp_path / "out.safetensors"
    name = "unet.conv_in.weight"
    for adapter, save, message in [
        (Adapter({"model.q_proj.weight": weight}), save_kohya, "image models only"),
        (Adapter({name: weight}, added={name: torch.ones(4, 3)}), save_kohya, "no place for added"),
        (Adapter({name: weight}, saved={name: torch.ones(4, 3)}), save_lycoris, "no place for saved"),
        (Adapter({name: replace(weight, magnitude=torch.ones(4))}), save_kohya, "save as lycoris"),
        (Adapter({name: replace(weight, kind=Kind.EMBEDDING)}), save_diffusers, "this is embedding"),
        (Adapter({"diffusion_model.x.weight": weight}), save_diffusers, "original code"),
        (Adapter({name: replace(weight, magnitude=torch.ones(1, 3))}), save_diffusers, "save as lycoris"),
    ]:
        with pytest.raises(UsageError, match=message):
            save(adapter, file)
    with pytest.raises(FormatError, match="no such adapter file"):
        open_kohya(file)
    assert not list(tmp_path.iterdir())
    with pytest.raises(FormatError, match="open it as lycoris"):
        open_kohya({"lora_unet_conv_in.diff": torch.ones(4, 3)})
