"""Module names of a Stable Diffusion UNet: from its original code (``input_blocks.4.1...``) to diffusers'.

kohya's SDXL files and ComfyUI's UNet files use the first, diffusers the second; the layers are the same ones.
The original counts blocks through, three to a level (two layers and a change of size), in SD 1, 2 and XL alike.
"""

from __future__ import annotations

import re
from dataclasses import replace

from mergekit_lr.adapter.adapter import Adapter
from mergekit_lr.errors import UsageError

_LEVEL = 3
_RESNET = {
    "in_layers.0": "norm1",
    "in_layers.2": "conv1",
    "emb_layers.1": "time_emb_proj",
    "out_layers.0": "norm2",
    "out_layers.3": "conv2",
    "skip_connection": "conv_shortcut",
}
_OUTSIDE = {
    "input_blocks.0.0": "conv_in",
    "time_embed.0": "time_embedding.linear_1",
    "time_embed.2": "time_embedding.linear_2",
    "label_emb.0.0": "add_embedding.linear_1",
    "label_emb.0.2": "add_embedding.linear_2",
    "out.0": "conv_norm_out",
    "out.2": "conv_out",
}
_MIDDLE = {"0": "resnets.0", "1": "attentions.0", "2": "resnets.1"}
_BLOCK = re.compile(r"(input_blocks|output_blocks)\.(\d+)\.(\d)\.(.+)|middle_block\.([012])\.(.+)")


def is_ldm(adapter: Adapter) -> bool:
    """Whether the adapter's names are those of a Stable Diffusion UNet in its original code."""
    return any(
        name.startswith(
            ("diffusion_model.input_blocks.", "diffusion_model.middle_block.", "diffusion_model.output_blocks.")
        )
        for name in (*adapter.weights, *adapter.added)
    )


def in_diffusers_names(adapter: Adapter) -> Adapter:
    """The same changes under diffusers' names, ``unet.`` in front; text encoders keep theirs.

    Raises:
        UsageError: a module that such a UNet does not have.
    """

    def rename(name: str) -> str:
        component, _, rest = name.partition(".")
        if component != "diffusion_model":
            return name
        module, _, leaf = rest.rpartition(".")
        return f"unet.{module_name(module)}.{leaf}"

    return replace(
        adapter,
        weights={rename(name): weight for name, weight in adapter.weights.items()},
        added={rename(name): tensor for name, tensor in adapter.added.items()},
    )


def module_name(module: str) -> str:
    """``output_blocks.5.1.proj_in`` -> ``up_blocks.1.attentions.2.proj_in``.

    Raises:
        UsageError: no module of such a UNet.
    """
    if module in _OUTSIDE:
        return _OUTSIDE[module]
    match = _BLOCK.fullmatch(module)
    if match is None:
        raise UsageError(f"{module}: a Stable Diffusion UNet has no such module")
    side, number, part, rest, middle, middle_rest = match.groups()
    if middle:
        return _inner(f"mid_block.{_MIDDLE[middle]}", middle_rest, module)
    if side == "output_blocks":
        level, layer = divmod(int(number), _LEVEL)
        block = f"up_blocks.{level}"
        if rest == "conv":
            return f"{block}.upsamplers.0.conv"
    else:
        level, layer = divmod(int(number) - 1, _LEVEL)
        block = f"down_blocks.{level}"
        if rest == "op":
            return f"{block}.downsamplers.0.conv"
    return _inner(f"{block}.{'attentions' if part == '1' else 'resnets'}.{layer}", rest, module)


def _inner(place: str, rest: str, module: str) -> str:
    """A layer inside a residual block has another name in diffusers, one inside an attention block the same."""
    if ".attentions." in place:
        return f"{place}.{rest}"
    if rest not in _RESNET:
        raise UsageError(f"{module}: a Stable Diffusion UNet has no such module")
    return f"{place}.{_RESNET[rest]}"
