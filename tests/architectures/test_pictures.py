"""Vision, speech, vision-language and diffusion models: convolutions, class tokens, renamed and nested towers."""

import diffusers as D
import pytest
import torch
import transformers as T
from finetune import roundtrip
from test_text import ENCODER, IDS, SMALL

torch.manual_seed(0)
PIXELS = torch.randn(2, 3, 16, 16)
VISION = {"hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 1, "num_attention_heads": 2}


def vit():
    settings = T.ViTConfig(**VISION, image_size=16, patch_size=8, num_labels=3)
    return T.ViTForImageClassification(settings), {"pixel_values": PIXELS}


def clip():
    text = {**ENCODER, "num_hidden_layers": 1, "eos_token_id": 39}
    settings = T.CLIPConfig(
        text_config=text, vision_config={**VISION, "image_size": 16, "patch_size": 8}, projection_dim=12
    )
    return T.CLIPModel(settings), {"input_ids": IDS, "pixel_values": PIXELS}


def resnet():
    settings = T.ResNetConfig(embedding_size=8, hidden_sizes=[8, 12], depths=[1, 1], layer_type="basic", num_labels=3)
    return T.ResNetForImageClassification(settings), {"pixel_values": PIXELS}


def whisper():
    settings = T.WhisperConfig(
        vocab_size=40, d_model=16, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2,
        decoder_attention_heads=2, encoder_ffn_dim=24, decoder_ffn_dim=24, num_mel_bins=8, max_source_positions=10,
        max_target_positions=16, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    return T.WhisperForConditionalGeneration(settings), {
        "input_features": torch.linspace(-1, 1, 2 * 8 * 20).reshape(2, 8, 20),
        "decoder_input_ids": IDS,
    }


def llava():
    settings = T.LlavaConfig(
        vision_config=T.CLIPVisionConfig(**VISION, image_size=16, patch_size=8),
        text_config=T.LlamaConfig(**SMALL),
        image_token_index=39,
        vision_feature_layer=-1,
    )
    ids = torch.tensor([[1, 39, 39, 39, 39, 5], [1, 39, 39, 39, 39, 6]])
    return T.LlavaForConditionalGeneration(settings), {"input_ids": ids, "pixel_values": PIXELS}


def qwen2_vl():
    rope = {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}
    settings = T.Qwen2VLConfig(
        text_config={**SMALL, "rope_parameters": rope, "bos_token_id": 1, "eos_token_id": 2},
        vision_config={
            "depth": 1, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4,
            "spatial_merge_size": 2, "temporal_patch_size": 2,
        },
        image_token_id=38, video_token_id=37, vision_start_token_id=36, vision_end_token_id=35,
    )  # fmt: skip
    ids = torch.tensor([[1, 36, 38, 38, 38, 38, 35, 5]])
    pixels = torch.linspace(-1, 1, 16 * 3 * 2 * 16).reshape(16, 96)
    return T.Qwen2VLForConditionalGeneration(settings), {
        "input_ids": ids, "pixel_values": pixels, "image_grid_thw": torch.tensor([[1, 4, 4]]),
        "mm_token_type_ids": (ids == 38).int(),
    }  # fmt: skip


def unet():
    model = D.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip
    text = torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12)
    return model, {"sample": PIXELS[:, :1, :8, :8].repeat(1, 4, 1, 1), "timestep": 3, "encoder_hidden_states": text}


def flux():
    model = D.FluxTransformer2DModel(
        in_channels=4, num_layers=1, num_single_layers=1, attention_head_dim=8, num_attention_heads=2,
        joint_attention_dim=12, pooled_projection_dim=10, axes_dims_rope=(2, 2, 4), guidance_embeds=False,
    )  # fmt: skip
    return model, {
        "hidden_states": torch.linspace(-1, 1, 2 * 6 * 4).reshape(2, 6, 4),
        "encoder_hidden_states": torch.linspace(-1, 1, 2 * 5 * 12).reshape(2, 5, 12),
        "pooled_projections": torch.linspace(-1, 1, 20).reshape(2, 10),
        "timestep": torch.tensor([0.3, 0.7]),
        "img_ids": torch.arange(18.0).reshape(6, 3),
        "txt_ids": torch.zeros(5, 3),
    }


# Matrices that go in full, and why PEFT has no LoRA for them.
FULL = {
    vit: {"cls_token": "kind", "position_embeddings": "kind"},
    clip: {"position_embedding": "reads"},
    whisper: {"embed_positions": "", "conv1": "stride", "conv2": "stride"},
    llava: {"position_embedding": "reads"},
}
MODELS = [vit, clip, resnet, whisper, llava, qwen2_vl, unet, flux]


@pytest.mark.parametrize("everything", [False, True], ids=["matrices", "everything"])
@pytest.mark.parametrize("build", MODELS, ids=lambda build: build.__name__)
def test_full_rank_gives_the_finetune_back(build, everything, tmp_path):
    model, inputs = build()
    made = roundtrip(model, inputs, tmp_path, everything=everything)
    assert not made.plan.refused
    expected = FULL.get(build, {})
    assert {part for part in expected if any(part in name for name in made.plan.reasons)} == set(expected)
    for name, why in made.plan.reasons.items():
        assert any(part in name and reason in why for part, reason in expected.items()), (name, why)
