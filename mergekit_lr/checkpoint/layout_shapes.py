"""A layout from names and shapes alone: each tensor on disk is one parameter of the same name in memory.

For a plain decoder that is exact: its names on disk are its names in memory, and all of its matrices are
``nn.Linear`` or ``nn.Embedding``. For other models it is the best that can be said without their code.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

from mergekit_lr.checkpoint.parameter import Block, Kind, Parameter

_PLAIN = re.compile(
    r"model\.embed_tokens\.weight|lm_head\.weight|model\.norm\.(weight|bias)"
    r"|model\.layers\.\d+\.((self_attn\.[qkvo]_proj|mlp\.(gate|up|down)_proj)\.(weight|bias)"
    r"|(self_attn\.[qk]_norm|\w+_layernorm)\.(weight|bias))"
)
# Names that embedding tables go by; a table with another name is known by its first axis, the vocabulary.
_TABLE = re.compile(r"(^|\.)\w*(embed|wte|wpe|shared|rel_pos|relative_attention_bias)\w*(\.\w*embeddings?)?\.weight$")
# The last resort where no code can be asked: weights that the models known to have them take for themselves.
# State spaces (Mamba, Jamba), relative positions (DeBERTa), position tables (OPT, BART, Whisper) and the two
# convolutions of Whisper's encoder, whose stride is read; a LoRA on one of these does nothing or fails.
_BYPASSED = re.compile(
    r"(mixer|mamba)\.(dt_proj|x_proj|out_proj)\.weight$|rel_embeddings\.weight$|embed_positions\.weight$"
    r"|position_embeddings?\.weight$|encoder\.conv[12]\.weight$"
)
# PEFT takes a target of one of these names for an expert's where a model has stacked experts.
_FUSED = re.compile(r"(^|\.)(gate|gate_proj|up_proj|down_proj|w1|w2|w3)\.weight$")
# Linear layers that may have as many rows as the vocabulary: an output head, or a width that happens to meet it.
_PROJECTION = re.compile(r"head|output|proj|dense|linear|mlp|attn|attention|fc\d?\.")
_EXPERTS = re.compile(r"(^|\.|_)experts?(\.|_|$)")


def is_plain_decoder(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> bool:
    """Whether this is a decoder whose names and kinds need no code to be known.

    Strict on purpose: one tensor that does not fit, a class that is no ``ForCausalLM``, or a config that
    speaks of experts (PEFT renames the targets of such models) leaves the checkpoint to the slower ways.
    """
    architecture = (config.get("architectures") or [""])[0] or ""
    if not architecture.endswith("ForCausalLM") or any("expert" in key for key in config):
        return False
    if config.get("auto_map") or "model.embed_tokens.weight" not in shapes:
        return False
    # A tied head that is on disk all the same is tied or not by its values.
    if "lm_head.weight" in shapes and config.get("tie_word_embeddings"):
        return False
    return all(
        _PLAIN.fullmatch(name) and len(shape) == (2 if "_proj.w" in name or "embed" in name or "lm_" in name else 1)
        for name, shape in shapes.items()
    )


def from_shapes(shapes: dict[str, tuple[int, ...]], config: dict[str, Any]) -> dict[str, Any]:
    """Fields of a ``Layout``: one parameter per tensor, its kind read off its name and shape."""
    vocabulary = config.get("vocab_size")
    found = [_parameter(name, shapes[name], vocabulary) for name in sorted(shapes, key=_order)]
    if any(parameter.kind is Kind.EXPERTS for parameter in found):
        found = [
            replace(p, carrier="parameter") if p.carrier == "module" and _FUSED.search(p.name) else p for p in found
        ]
    fields: dict[str, Any] = {"parameters": tuple(found)}
    # A causal model without a head on disk shares its input table.
    table = "model.embed_tokens.weight"
    if table in shapes and "lm_head.weight" not in shapes and "ForCausalLM" in str(config.get("architectures")):
        head = Parameter("lm_head.weight", Kind.LINEAR, shapes[table], ((Block(table),),), carrier="module")
        fields |= {"tied": (head,), "ties": {head.name: table}}
    return fields


def _parameter(name: str, shape: tuple[int, ...], vocabulary: int | None) -> Parameter:
    if len(shape) < 2:
        return Parameter(name, Kind.VECTOR, shape, ((Block(name),),))
    kind, carrier = Kind.OTHER, ""
    if len(shape) == 3 and _EXPERTS.search(name):
        kind, carrier = Kind.EXPERTS, "parameter"
    elif name.endswith(".weight") and len(shape) == 2:
        table = _TABLE.search(name) or (shape[0] == vocabulary and not _PROJECTION.search(name))
        kind, carrier = Kind.EMBEDDING if table else Kind.LINEAR, "module"
    elif name.endswith(".weight") and len(shape) in (3, 4, 5):
        kind, carrier = Kind.CONVOLUTION, "module"
        # In one of groups (a depthwise one above all) PEFT orders the factors otherwise.
        if shape[1] == 1:
            carrier = ""
    blocks = ((Block(name),),)
    if kind is Kind.EXPERTS:
        blocks = tuple((Block(name, expert),) for expert in range(shape[0]))
    obstacle = "a convolution in groups" if kind is Kind.CONVOLUTION and not carrier else ""
    if carrier and _BYPASSED.search(name):
        carrier, obstacle = "", "models with a weight of this name read it past a LoRA"
    return Parameter(name, kind, shape, blocks, carrier=carrier, obstacle=obstacle)


def _order(name: str) -> list[tuple[int, int, str]]:
    """Natural order, layer 2 before layer 10, and the down projection behind the up projection, as in memory."""
    return [
        (0, int(part), "") if part.isdigit() else (1, int(part.startswith("down")), part) for part in name.split(".")
    ]
