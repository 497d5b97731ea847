"""The loading snippets of cards, run as they stand: what they load computes what the result says.

vLLM is not at hand here; its snippets are held against what its documentation says of their arguments, and what they
ask of lrmerge first is run.
"""

from __future__ import annotations

import ast
import json
import shlex
import warnings
from pathlib import Path
from typing import Any

import diffusers as D
import peft
import pytest
import tiny
import torch
import transformers as T
from results import ADAPTERS, MODELS, REVISION, World, blocks, cached, working_in
from torch import Tensor, nn

import mergekit_lr as lr
from mergekit_lr.adapter.target import SERVERS
from mergekit_lr.report.loading import THIS, addressed

IDS = {"input_ids": torch.tensor([[1, 5, 9, 2, 7, 11]])}


def run(card: str, heading: str, here: Path, this: Path | str) -> dict[str, Any]:
    """The names that the Python blocks of a section make, run one after another in ``here``."""
    found: dict[str, Any] = {}
    with working_in(here), warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # PEFT tells of keys that it misses or does not expect
        warnings.filterwarnings("ignore", message=".*(?i:tied|merge_and_unload).*")
        for code in blocks(addressed(card, str(this)), "python", heading):
            exec(compile(code, heading, "exec"), found)
    return found


def logits(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.float().eval()(**IDS).logits


def built(tensors: dict[str, Tensor]) -> nn.Module:
    """The tiny decoder with these weights."""
    model = T.LlamaForCausalLM(T.LlamaConfig(**tiny.CONFIG))
    model.load_state_dict({name: tensor.float() for name, tensor in tensors.items()})
    return model


def baked(world: World, adapter: Path) -> nn.Module:
    """What the adapter makes of its base, by our own arithmetic."""
    tensors = lr.apply(world.snapshot("tiny/base"), [(str(adapter), 1.0)]).tensors
    assert tensors is not None
    return built(tensors)


@pytest.mark.parametrize("name", ADAPTERS)
def test_peft_loads_an_adapter(world, name):
    found = run(world.card(name), "PEFT", world.here, world.results[name])
    assert isinstance(found["model"], peft.PeftModel)
    wanted = logits(baked(world, world.results[name]))
    torch.testing.assert_close(logits(found["model"]), wanted, rtol=1e-4, atol=1e-4)
    base = built(tiny.decoder())
    assert (logits(base) - wanted).abs().max() > 0.01


@pytest.mark.parametrize("name", ADAPTERS)
def test_transformers_loads_a_plain_adapter(world, name):
    code = blocks(world.card(name), "python", "transformers")
    assert bool(code) == (name != "full")  # that one saves modules in full
    if not code:
        return
    found = run(world.card(name), "transformers", world.here, world.results[name])
    wanted = logits(baked(world, world.results[name]))
    torch.testing.assert_close(logits(found["model"]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", MODELS)
def test_transformers_loads_a_model(world, name):
    found = run(world.card(name), "transformers", world.here, world.results[name])
    held = lr.Checkpoint.open(world.results[name])
    wanted = logits(built({key: held.read(key) for key in held.tensors}))
    torch.testing.assert_close(logits(found["model"]), wanted, rtol=1e-4, atol=1e-4)


def vllm_calls(code: str) -> dict[str, ast.Call]:
    """The calls of a snippet by the last name of what is called."""
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    return {ast.unparse(call.func).rpartition(".")[2]: call for call in calls}


@pytest.mark.parametrize("name", [*ADAPTERS, *MODELS])
def test_vllm_snippets_are_what_its_documentation_says(world, name, tmp_path):
    card = addressed(world.card(name), str(world.results[name]))
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny").symlink_to(world.here / "tiny")
    commands = [line for block in blocks(card, "sh", "vLLM") for line in block.splitlines()]
    with working_in(here):
        for program, *arguments in map(shlex.split, commands):
            if program == "lrmerge":
                ended = tiny.lrmerge(*arguments)
                assert ended.code == 0, ended
            else:
                assert (program, *arguments) == ("vllm", "serve", "model")
                assert T.AutoConfig.from_pretrained("model").model_type == "llama"
    code = blocks(card, "python", "vLLM")
    assert len(code) == (0 if name == "full" else 1)
    if not code:
        assert "vLLM takes no modules saved in full" in card
        return
    calls = vllm_calls(code[0])
    keywords = {call: {word.arg for word in node.keywords} for call, node in calls.items()}
    assert keywords["SamplingParams"] == {"max_tokens"}
    if name in MODELS:
        assert keywords["LLM"] == keywords["generate"] == set()
        assert ast.literal_eval(calls["LLM"].args[0]) == str(world.results[name])
        return
    assert keywords["LLM"] == {"enable_lora", "max_lora_rank"}
    assert keywords["generate"] == {"lora_request"}
    assert ast.literal_eval(calls["LLM"].args[0]) == "tiny/base"
    _, number, path = (ast.literal_eval(argument) for argument in calls["LoRARequest"].args)
    assert number > 0
    served = json.loads((here / path / "adapter_config.json").read_text())
    allowed = next(ast.literal_eval(w.value) for w in calls["LLM"].keywords if w.arg == "max_lora_rank")
    assert served["r"] <= allowed
    assert allowed in SERVERS["vllm"].ranks
    assert not served["rank_pattern"]
    assert not served["alpha_pattern"]
    assert not served["modules_to_save"]
    assert not served["use_dora"]


# --- other kinds of models ---


def changed(model: nn.Module, folder: Path, seed: int = 1) -> Path:
    """The model with every matrix changed, as a folder."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter += 0.02 * torch.randn_like(parameter)
    model.save_pretrained(folder)
    return folder


def test_a_classifier_is_loaded_with_its_labels(tmp_path):
    config = T.BertConfig(
        hidden_size=16, intermediate_size=24, num_hidden_layers=1, num_attention_heads=2, vocab_size=30,
        num_labels=5,
    )  # fmt: skip
    model = T.BertForSequenceClassification(config).eval()
    model.save_pretrained(tmp_path / "path" / "to" / "base")
    changed(model, tmp_path / "tuned")
    lr.extract(tmp_path / "path" / "to" / "base", tmp_path / "tuned", tmp_path / "out", error=0)
    card = (tmp_path / "out" / "README.md").read_text()
    found = run(card, "PEFT", tmp_path, tmp_path / "out")
    torch.testing.assert_close(logits(found["model"]), logits(model), rtol=1e-4, atol=1e-4)
    assert "num_labels=5" in card
    assert "pipeline_tag: text-classification" in card
    assert "vLLM" not in card


def test_an_adapter_of_a_revision_loads_that_revision(tmp_path):
    from mergekit_lr.report.adapter_card import base_of
    from mergekit_lr.report.inputs import Input

    folder = cached(tmp_path, "org/base", tiny.decoder(), "license: mit\n")
    one = Input.of("base", "org/base@v1.0", folder)
    assert base_of(one, config={}) == ("org/base", "v1.0", "", {})
    assert (one.name, one.hub, one.revision) == ("org/base", "org/base", REVISION)


def test_dora_is_no_business_of_vllm(tmp_path):
    model = T.AutoModelForCausalLM.from_pretrained(tiny.save(tmp_path / "base", tiny.decoder()))
    config = peft.LoraConfig(r=2, use_dora=True, target_modules=["q_proj"], task_type="CAUSAL_LM")
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "dora")
    lr.compress(tmp_path / "dora", tmp_path / "out", rank=1)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "vLLM takes no DoRA magnitudes, which this adapter has." in card
    assert blocks(card, "python", "vLLM") == blocks(card, "python", "transformers") == []


def unet() -> D.UNet2DConditionModel:
    torch.manual_seed(0)
    return D.UNet2DConditionModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, cross_attention_dim=12, norm_num_groups=4,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D"), up_block_types=("CrossAttnUpBlock2D", "UpBlock2D"),
        attention_head_dim=4,
    )  # fmt: skip


def picture(model: nn.Module) -> Tensor:
    sample, text = torch.linspace(-1, 1, 256).reshape(1, 4, 8, 8), torch.linspace(-1, 1, 60).reshape(1, 5, 12)
    with torch.no_grad():
        return model.eval()(sample, 3, encoder_hidden_states=text).sample


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory) -> Path:
    """A folder with a tiny pipeline PIPELINE, the cache of a Hub that holds its UNet, and a fine-tune of that."""
    here = tmp_path_factory.mktemp("pictures")
    small = {"hidden_size": 12, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    words = {"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}
    pipe = D.StableDiffusionPipeline(
        vae=D.AutoencoderKL(block_out_channels=(4,), norm_num_groups=2, latent_channels=4),
        text_encoder=T.CLIPTextModel(T.CLIPTextConfig(vocab_size=3, bos_token_id=0, eos_token_id=1, **small)),
        tokenizer=T.CLIPTokenizer(vocab=words, merges=[]),
        unet=unet(),
        scheduler=D.DDIMScheduler(),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipe.save_pretrained(here / "PIPELINE")
    snapshot = here / "models--tiny--pipe" / "snapshots" / REVISION
    unet().save_pretrained(snapshot / "unet")
    changed(unet(), here / "tuned")
    (here / "tiny").mkdir()
    (here / "tiny" / "pipe").symlink_to(snapshot)
    lr.extract(snapshot / "unet", here / "tuned", here / "out", error=0, rest="skip")
    return here


def test_a_lora_of_a_unet_is_loaded_by_peft_and_goes_into_a_pipeline(pipeline):
    card = (pipeline / "out" / "README.md").read_text()
    assert "base_model:\n- tiny/pipe\n" in card
    found = run(card, "PEFT", pipeline, pipeline / "out")
    wanted = picture(D.UNet2DConditionModel.from_pretrained(pipeline / "tuned"))
    torch.testing.assert_close(picture(found["model"]), wanted, rtol=1e-4, atol=1e-4)
    [line] = [line for line in card.splitlines() if "DiffusionPipeline.from_pretrained(PIPELINE, unet=model)" in line]
    with working_in(pipeline):
        pipe = eval(line.split("`")[1], {"DiffusionPipeline": D.DiffusionPipeline, "PIPELINE": "PIPELINE"} | found)
    torch.testing.assert_close(picture(pipe.unet), wanted, rtol=1e-4, atol=1e-4)
    assert "vLLM" not in card


def test_a_lora_of_a_unet_is_converted_and_loaded_by_diffusers(pipeline):
    card = addressed((pipeline / "out" / "README.md").read_text(), "out")
    [command] = blocks(card, "sh", "diffusers")
    with working_in(pipeline):
        ended = tiny.lrmerge(*shlex.split(command)[1:])
    assert ended.code == 0, ended
    found = run(card, "diffusers", pipeline, "out")
    wanted = picture(D.UNet2DConditionModel.from_pretrained(pipeline / "tuned"))
    torch.testing.assert_close(picture(found["pipe"].unet), wanted, rtol=1e-4, atol=1e-4)


def test_a_unet_with_a_lora_baked_in_is_loaded_by_diffusers(pipeline):
    lr.apply(pipeline / "PIPELINE" / "unet", [pipeline / "out"], pipeline / "baked")
    card = (pipeline / "baked" / "README.md").read_text()
    assert "library_name: diffusers" in card
    found = run(card, "diffusers", pipeline, pipeline / "baked")
    wanted = picture(D.UNet2DConditionModel.from_pretrained(pipeline / "tuned"))
    torch.testing.assert_close(picture(found["model"]), wanted, rtol=1e-4, atol=1e-4)


def test_a_model_without_a_config_is_loaded_as_tensors(tmp_path):
    base = tiny.decoder()
    for seed in (1, 2):
        tiny.save(tmp_path / str(seed), tiny.finetuned(base, seed=seed), config=None)
    recipe = {"merge_method": "linear", "models": [{"model": str(tmp_path / one)} for one in "12"]}
    lr.merge(recipe, tmp_path / "out")
    card = (tmp_path / "out" / "README.md").read_text()
    assert THIS in card
    found = run(card, "safetensors", tmp_path, tmp_path / "out")
    assert found["tensors"].keys() == base.keys()


def test_a_merge_into_one_file_has_no_card(pipeline, tmp_path):
    lr.convert(pipeline / "out", tmp_path / "lora.safetensors", to="kohya", component="unet")
    recipe = {"merge_method": "cat", "adapters": [{"adapter": str(tmp_path / "lora.safetensors")}] * 2}
    report = lr.merge(recipe | {"output": {"format": "kohya"}}, tmp_path / "two.safetensors")
    assert report.format == "kohya"
    assert {path.name for path in tmp_path.glob("two*")} == {"two.safetensors", "two.lrmerge.json"}
