"""How to load a result: a snippet for each library that can, made from what the result's own files say.

An adapter's from its ``adapter_config.json`` and its keys, a model's from its ``config.json``. What a server cannot
take of it is said in the snippet's place. vLLM's limits: its ``vllm/lora/peft_helper.py`` (one rank and one scale, no
``modules_to_save``, no DoRA) and the ranks of ``mergekit_lr.adapter.target``.
"""

from __future__ import annotations

import json
import shlex
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lr.adapter.target import SERVERS
from mergekit_lr.checkpoint.checkpoint import read_config
from mergekit_lr.checkpoint.safetensors import read_header
from mergekit_lr.report.markdown import fenced, plain

# Stands for the result itself; ``addressed`` puts its address there once that is known.
THIS = "PATH_OR_HUB_ID_OF_THIS"

# End of a transformers class to its Auto class and to the Hub's tag of its task. Other classes are named themselves.
_CLASSES = {
    "ForCausalLM": ("AutoModelForCausalLM", "text-generation"),
    "LMHeadModel": ("AutoModelForCausalLM", "text-generation"),
    "ForMaskedLM": ("AutoModelForMaskedLM", "fill-mask"),
    "ForSequenceClassification": ("AutoModelForSequenceClassification", "text-classification"),
    "ForTokenClassification": ("AutoModelForTokenClassification", "token-classification"),
    "ForQuestionAnswering": ("AutoModelForQuestionAnswering", "question-answering"),
    "ForImageClassification": ("AutoModelForImageClassification", "image-classification"),
    "ForObjectDetection": ("AutoModelForObjectDetection", "object-detection"),
    "ForSemanticSegmentation": ("AutoModelForSemanticSegmentation", "image-segmentation"),
    "ForAudioClassification": ("AutoModelForAudioClassification", "audio-classification"),
    "ForCTC": ("AutoModelForCTC", "automatic-speech-recognition"),
}
_TASKS = {
    "CAUSAL_LM": "AutoModelForCausalLM",
    "SEQ_2_SEQ_LM": "AutoModelForSeq2SeqLM",
    "SEQ_CLS": "AutoModelForSequenceClassification",
    "TOKEN_CLS": "AutoModelForTokenClassification",
    "QUESTION_ANS": "AutoModelForQuestionAnswering",
}
_LABELLED = ("AutoModelForSequenceClassification", "AutoModelForTokenClassification", "AutoModelForImageClassification")
_GENERATES = ("ForCausalLM", "LMHeadModel", "ForConditionalGeneration")
_OWN_CODE = "The model brings code of its own, which transformers runs with `trust_remote_code=True` only."


class Base(NamedTuple):
    """The base that an adapter is put onto: where it is loaded from, and the config of the model to load it as."""

    where: str
    revision: str | None = None
    subfolder: str = ""
    config: Mapping[str, Any] = {}


def architecture(config: Mapping[str, Any]) -> str | None:
    """The class that a config names, if it is a name."""
    named = (config.get("architectures") or [None])[0] if isinstance(config.get("architectures"), list) else None
    named = named or config.get("_class_name")
    return named if isinstance(named, str) and named.isidentifier() and named.isascii() else None


def library(config: Mapping[str, Any]) -> str | None:
    """The library that loads a model of this config, as the Hub names it."""
    if "_class_name" in config or "_diffusers_version" in config:
        return "diffusers"
    return "transformers" if "architectures" in config or "model_type" in config else None


def pipeline_tag(config: Mapping[str, Any]) -> str | None:
    """The Hub's tag of what a model of this config does, where its class says so."""
    name = architecture(config) or ""
    return next((tag for end, (_, tag) in _CLASSES.items() if name.endswith(end)), None)


def addressed(card: str, address: str) -> str:
    """``card`` with the result's own address, such as its Hub id, in its snippets."""
    return card.replace(THIS, address)


def loading_an_adapter(folder: Path, base: Base) -> str:
    """The section of a card about loading the PEFT adapter in ``folder``."""
    config = read_config(folder / "adapter_config.json")
    tensors = read_header(folder / "adapter_model.safetensors")[0]
    name = architecture(base.config)
    of_diffusers = library(base.config) == "diffusers" and name is not None
    parts = [_heading("PEFT", _with_peft(config, base, of_diffusers))]
    if of_diffusers and (component := _component(name or "")):
        parts.append(_heading("diffusers", _converted(component)))
    if of_diffusers:
        return "\n\n".join(parts)
    obstacles = _obstacles(config, tensors)
    loads = _loading(base, config)
    if loads is not None and not obstacles.keys() - {"ranks"}:
        code = f"{loads}\nmodel.load_adapter({_text(THIS)})"
        parts.append(_heading("transformers", fenced(code, "python")))
    generates = name.endswith(_GENERATES) if name else config.get("task_type") == "CAUSAL_LM"
    if generates:
        parts.append(_heading("vLLM", _with_vllm(config, obstacles, tensors, base)))
    return "\n\n".join(parts)


def loading_a_model(folder: Path) -> str:
    """The section of a card about loading the model in ``folder``."""
    config = read_config(folder / "config.json")
    name = architecture(config)
    if name is None:
        file = min(folder.glob("*.safetensors")).name
        code = f"from safetensors.torch import load_file\n\ntensors = load_file({_text(f'{THIS}/{file}')})"
        return _heading("safetensors", fenced(code, "python"))
    if library(config) == "diffusers":
        code = f"from diffusers import {name}\n\nmodel = {name}.from_pretrained({_text(THIS)})"
        text = fenced(code, "python")
        if component := _component(name):
            text += f"\n\nA pipeline takes it as `DiffusionPipeline.from_pretrained(PIPELINE, {component}=model)`."
        return _heading("diffusers", text)
    auto = _auto_class(name)
    code = f"from transformers import {auto}\n\nmodel = {auto}.from_pretrained({_text(THIS)})"
    text = fenced(code, "python")
    if "auto_map" in config:
        text += f"\n\n{_OWN_CODE}"
    parts = [_heading("transformers", text)]
    if name.endswith(_GENERATES):
        code = (
            "from vllm import LLM, SamplingParams\n\n"
            f"llm = LLM({_text(THIS)})\n"
            'print(llm.generate("Once upon a time", SamplingParams(max_tokens=64))[0].outputs[0].text)'
        )
        parts.append(_heading("vLLM", fenced(code, "python")))
    return "\n\n".join(parts)


def _with_peft(config: Mapping[str, Any], base: Base, of_diffusers: bool) -> str:
    adapted = f"model = PeftModel.from_pretrained(model, {_text(THIS)})"
    name = architecture(base.config)
    if of_diffusers:
        code = f"from diffusers import {name}\nfrom peft import PeftModel\n\nmodel = {name}.{_from(base)}\n{adapted}"
        component = _component(name or "")
        after = f"\n\nA pipeline takes it as `DiffusionPipeline.from_pretrained(PIPELINE, {component}=model)`."
        return fenced(code, "python") + (after if component else "")
    loads = _loading(base, config)
    if loads is None:
        text = "Load the base in the class that the adapter was made for, as `model`; then"
        return f"{text}\n\n{fenced(f'from peft import PeftModel{chr(10)}{chr(10)}{adapted}', 'python')}"
    own = f"\n\n{_OWN_CODE}" if "auto_map" in base.config else ""
    return fenced(f"from peft import PeftModel\n{loads}\n{adapted}", "python") + own


def _loading(base: Base, config: Mapping[str, Any]) -> str | None:
    """Two statements that import a class of transformers and load the base; None where the class is not known."""
    name = architecture(base.config)
    auto = _auto_class(name) if name else _TASKS.get(config.get("task_type") or "")
    if auto is None:
        return None
    labels = base.config.get("id2label")
    count = len(labels) if auto in _LABELLED and isinstance(labels, dict) else 2
    more = f", num_labels={count}" if count != 2 else ""
    return f"from transformers import {auto}\n\nmodel = {auto}.{_from(base, more)}"


def _from(base: Base, more: str = "") -> str:
    revision = f", revision={_text(base.revision)}" if base.revision else ""
    subfolder = f", subfolder={_text(base.subfolder)}" if base.subfolder else ""
    return f"from_pretrained({_text(base.where)}{subfolder}{revision}{more})"


def _converted(component: str) -> str:
    command = f"lrmerge convert {THIS} --to diffusers --component {component} -o lora.safetensors"
    code = (
        "from diffusers import DiffusionPipeline\n\n"
        'pipe = DiffusionPipeline.from_pretrained("PIPELINE")\n'
        'pipe.load_lora_weights("lora.safetensors")'
    )
    return f"{fenced(command, 'sh')}\n\n{fenced(code, 'python')}"


def _obstacles(config: Mapping[str, Any], tensors: Iterable[str]) -> dict[str, str]:
    """What a plain loader of LoRAs cannot take of an adapter: "ranks", "experts", or else "more", and its words."""
    more = [
        words
        for there, words in (
            (config.get("modules_to_save"), "modules saved in full"),
            (config.get("bias") not in (None, "none"), "tensors that replace the base's own"),
            (config.get("use_dora"), "DoRA magnitudes"),
            (config.get("lora_bias"), "biases of LoRA layers"),
            (config.get("trainable_token_indices"), "trained token rows"),
            (any("lora_embedding_" in key for key in tensors), "factors of embeddings"),
        )
        if there
    ]
    found = {"more": " and no ".join(more)} if more else {}
    if config.get("target_parameters"):
        found["experts"] = "experts in one stack"
    if config.get("rank_pattern") or config.get("alpha_pattern"):
        found["ranks"] = "ranks or scales that differ between modules"
    return found


def _with_vllm(config: Mapping[str, Any], obstacles: Mapping[str, str], tensors: Iterable[str], base: Base) -> str:
    if "more" in obstacles:
        command = f"lrmerge apply {shlex.quote(base.where)} {THIS} -o model\nvllm serve model"
        text = f"vLLM takes no {obstacles['more']}, which this adapter has. Apply it to its base and serve that:"
        return f"{text}\n\n{fenced(command, 'sh')}"
    rank = max([config["r"], *(config.get("rank_pattern") or {}).values()])
    ranks = SERVERS["vllm"].ranks
    allowed = next((one for one in ranks if one >= rank), None)
    text, path = "", THIS
    if obstacles or allowed is None:
        why = " and ".join([*obstacles.values(), *([f"a rank above {ranks[-1]}"] if allowed is None else [])])
        limit = f" --max-rank {ranks[-1]}" if allowed is None else ""
        command = f"lrmerge compress {THIS} -o for-vllm --target vllm{limit}"
        how = "with the least loss" if allowed is None else "without loss"
        text = f"vLLM takes no {why}. This makes it fit, {how}:\n\n{fenced(command, 'sh')}\n\n"
        path = "for-vllm"
    if any("lm_head." in key for key in tensors):
        text += "vLLM takes a LoRA on the output head for some architectures only.\n\n"
    code = (
        "from vllm import LLM, SamplingParams\n"
        "from vllm.lora.request import LoRARequest\n\n"
        f"llm = LLM({_text(base.where)}, enable_lora=True, max_lora_rank={allowed or ranks[-1]})\n"
        f'lora = LoRARequest("adapter", 1, {_text(path)})\n'
        'answers = llm.generate("Once upon a time", SamplingParams(max_tokens=64), lora_request=lora)\n'
        "print(answers[0].outputs[0].text)"
    )
    return text + fenced(code, "python")


def _auto_class(name: str) -> str:
    return next((auto for end, (auto, _) in _CLASSES.items() if name.endswith(end)), name)


def _component(name: str) -> str | None:
    """The part of a pipeline that a class of diffusers is."""
    if name.startswith("UNet"):
        return "unet"
    return "transformer" if "Transformer" in name else None


def _text(value: str) -> str:
    """A literal of Python, in double quotes; JSON's is one where nothing but control characters is escaped."""
    return json.dumps(value, ensure_ascii=False)


def _heading(tool: str, text: str) -> str:
    return f"### {plain(tool)}\n\n{text}"
