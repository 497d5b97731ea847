"""Models with different vocabularies: every row by its definition, tokenizers that load, and mergekit's numbers."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
import yaml
from safetensors.torch import load_file
from tiny import CONFIG, HEAD, HIDDEN, NORM, TABLE, Tensors, contents, decoder, finetuned, lrmerge, refused, save
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE, WordLevel
from tokenizers.trainers import BpeTrainer
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

import mergekit_lr as lr
from mergekit_lr.errors import LrmergeError
from mergekit_lr.verbs.merge.alignment import in_ranges
from mergekit_lr.verbs.merge.chat import FORMATS
from mergekit_lr.verbs.merge.verb import plan_merge

TEXTS = {
    "base": "the cat sat on the mat and the cat ate the rat",
    "math": "the sum of one and one is the number two and the sum of two and two is four",
    "code": "for the word in the line print the word and return the line",
}
ADDED = {"base": ["<both>"], "math": ["<both>", "<think>"], "code": ["<call>", "<both>"]}
QUERY = "model.layers.1.self_attn.q_proj.weight"
NEVER = "<new>"


def bpe(text: str, added: list[str], size: int = 46) -> PreTrainedTokenizerFast:
    """A byte-level BPE trained on ``text``."""
    inner = Tokenizer(BPE())
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    inner.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(vocab_size=size, special_tokens=["<s>", "</s>"], show_progress=False)
    inner.train_from_iterator([text], trainer)
    made = PreTrainedTokenizerFast(tokenizer_object=inner, bos_token="<s>", eos_token="</s>")
    made.add_tokens(added)
    return made


def words(names: list[str]) -> PreTrainedTokenizerFast:
    """A tokenizer of whole words with the numbers of their order."""
    inner = Tokenizer(WordLevel({name: i for i, name in enumerate(names)}, unk_token=names[0]))
    inner.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token=names[0])


def model(
    folder: Path, tokenizer: PreTrainedTokenizerFast | None, *, seed: int, rows: int | None = None, tied: bool = False
) -> Path:
    """A small Llama with ``rows`` rows of tokens, and its tokenizer beside it."""
    tensors = finetuned(decoder(), seed=seed)
    random = torch.Generator().manual_seed(seed)
    count = rows or len(tokenizer or ())
    tensors |= {name: torch.randn(count, HIDDEN, generator=random) for name in (TABLE, HEAD)}
    if tied:
        del tensors[HEAD]
    special = {"bos_token_id": 0, "eos_token_id": 1}
    save(folder, tensors, config=CONFIG | special | {"vocab_size": count, "tie_word_embeddings": tied})
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def zoo(tmp_path_factory) -> Path:
    """Three models of different vocabularies, each with tables of its own size; the same tied; and two padded ones."""
    folder = tmp_path_factory.mktemp("vocabularies")
    for seed, (name, text) in enumerate(TEXTS.items()):
        tokenizer = bpe(text, ADDED[name])
        model(folder / name, tokenizer, seed=seed)
        model(folder / f"{name}-tied", tokenizer, seed=seed, tied=True)
        model(folder / f"{name}-padded", tokenizer, seed=seed, rows=64)
    generation = {"eos_token_id": [1], "max_new_tokens": 5}
    (folder / "base" / "generation_config.json").write_text(json.dumps(generation))
    return folder


def recipe(zoo: Path, *models: str, method: str = "linear", base: str | None = "base", **more: Any) -> dict[str, Any]:
    given = [{"model": str(zoo / name), "parameters": {"weight": 0.3 + 0.4 * i}} for i, name in enumerate(models)]
    made = {"version": 1, "merge_method": method, "models": given, **more}
    return made | ({"base_model": str(zoo / base)} if base else {})


def ids(folder: Path) -> dict[str, int]:
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def expected(
    tables: Mapping[str, Tensor],
    vocabularies: Mapping[str, dict[str, int]],
    new: dict[str, int],
    rows: int,
    base: str | None,
    given: Mapping[str, Tensor] | None = None,
    forced: tuple[str, ...] = (),
) -> dict[str, Tensor]:
    """Each model's table in the order of ``new``, row by row as it is defined; ``given``: rows that a recipe chose."""
    made = {name: torch.zeros(rows, HIDDEN) for name in tables}
    for token, at in new.items():
        having = [name for name in tables if token in vocabularies[name]]
        own = {name: tables[name][vocabularies[name][token]] for name in having}
        if given and token in given:
            shared = given[token]
        elif base in own and len(own) != 1:
            shared = own[base]
        else:
            shared = sum(own.values()) / len(own) if own else torch.zeros(HIDDEN)
        for name in tables:
            made[name][at] = shared if token in forced else own.get(name, shared)
    return made


def tables_of(zoo: Path, names: list[str], table: str = TABLE) -> dict[str, Tensor]:
    held = {name: load_file(zoo / name / "model.safetensors") for name in names}
    return {name: tensors[table if table in tensors else TABLE] for name, tensors in held.items()}


def close(found: Tensor, wanted: Tensor) -> None:
    torch.testing.assert_close(found, wanted, rtol=2e-6, atol=2e-6)


@pytest.mark.parametrize("source", ["union", "base", "code"])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("method", ["linear", "task_arithmetic"])
def test_every_row_is_by_definition(zoo, tmp_path, source, tied, method):
    base, *models = [f"{name}-tied" if tied else name for name in TEXTS]
    asked = str(zoo / models[1]) if source == "code" else source
    made = recipe(zoo, *models, method=method, base=base, tokenizer_source=asked)
    report = lr.merge(made, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    new, old = ids(tmp_path / "out"), {name: ids(zoo / name) for name in (base, *models)}
    if source == "union":
        assert new.keys() == set().union(*old.values())
        assert new.items() >= old[base].items()
    else:
        assert new == old[base if source == "base" else models[1]]
    assert (HEAD in out) is not tied
    for table in (TABLE, *([] if tied else [HEAD])):
        by_model = expected(tables_of(zoo, [*models, base], table), old, new, len(new), base)
        wanted = lr.merge_tensors(
            method,
            [by_model[name] for name in models],
            base=by_model[base] if method == "task_arithmetic" else None,
            weights=[0.3, 0.7],
        )
        close(out[table], wanted)
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vocab_size"] == len(new) == report.config["vocab_size"]
    assert config["tie_word_embeddings"] is tied
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    for token in ("<s>", "<both>", *(["<think>", "<call>"] if source == "union" else [])):
        [number] = tokenizer(token)["input_ids"]
        assert torch.equal(loaded.get_input_embeddings().weight[number], out[TABLE][new[token]])


@pytest.mark.parametrize("order", [("math", "code"), ("code", "math")])
def test_a_token_of_two_models_without_a_base_is_averaged(zoo, order):
    made = recipe(zoo, *order, "base", base=None, tokenizer_source="union")
    plan = plan_merge(made)
    alignment = plan.alignments[TABLE]
    old = {name: ids(zoo / name) for name in TEXTS}
    twice = [t for t in plan.vocabulary.chosen.ids if sum(t in vocabulary for vocabulary in old.values()) == 2]
    assert len(twice) >= 3
    assert int(alignment.kinds["average"].sum()) == len(twice)
    out = lr.merge(made).result
    assert out is not None
    names = [*order, "base"]
    wanted = expected(tables_of(zoo, names), old, plan.vocabulary.chosen.ids, plan.vocabulary.rows, None)
    close(out[TABLE], lr.merge_tensors("linear", [wanted[name] for name in names], weights=[0.3, 0.7, 1.1]))


def test_tokens_have_the_rows_that_the_recipe_says(zoo, tmp_path):
    tokens = {
        "<think>": {"source": {"kind": "zero"}},
        "<call>": {"source": str(zoo / "code"), "force": True},
        NEVER: {"source": {"kind": "model_token", "model": str(zoo / "math"), "token": "<think>"}},
        "<newer>": {"source": {"kind": "model_token", "model": str(zoo / "code"), "token_id": 3}},
        "<newest>": {},
        "<both>": {"source": str(zoo / "math"), "force": True},
        "<s>": {"source": {"kind": "zero"}},  # every model has it, and it is not forced
    }
    models = ["math", "code"]
    made = recipe(zoo, *models, tokenizer={"source": "union", "tokens": tokens, "pad_to_multiple_of": 16})
    report = lr.merge(made, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    new, old = ids(tmp_path / "out"), {name: ids(zoo / name) for name in TEXTS}
    rows = -(-len(new) // 16) * 16
    assert out[TABLE].shape[0] == out[HEAD].shape[0] == report.config["vocab_size"] == rows > len(new)
    for table in (TABLE, HEAD):
        tables = tables_of(zoo, list(TEXTS), table)
        given = {
            "<think>": torch.zeros(HIDDEN),
            "<call>": tables["code"][old["code"]["<call>"]],
            NEVER: tables["math"][old["math"]["<think>"]],
            "<newer>": tables["code"][3],
            "<newest>": torch.zeros(HIDDEN),
            "<both>": tables["math"][old["math"]["<both>"]],
        }
        wanted = expected(tables, old, new, rows, "base", given, ("<call>", "<both>"))
        for own in wanted.values():
            own[len(new) :] = own[: len(new)].mean(0)
        close(out[table], lr.merge_tensors("linear", [wanted[name] for name in models], weights=[0.3, 0.7]))
    counts = report.to_json()["vocabulary"]["tensors"][TABLE]
    assert counts["as the recipe says"]["rows"] == 5
    assert counts["mean of all rows"] == {"rows": rows - len(new), "ranges": in_ranges(torch.arange(rows) >= len(new))}
    assert counts["zero"]["rows"] == 1


def test_rows_without_a_token_stay(zoo, tmp_path):
    names = [f"{name}-padded" for name in TEXTS]
    made = recipe(zoo, *names[1:], base=names[0], tokenizer_source="base", method="task_arithmetic")
    report = lr.merge(made, tmp_path / "out")
    out = load_file(tmp_path / "out" / "model.safetensors")
    old = {name: ids(zoo / name) for name in TEXTS}
    assert out[TABLE].shape[0] == 64 == report.config["vocab_size"]
    assert any("rows have no token" in note and "pad_to_multiple_of: 1" in note for note in report.notes)
    top = max(len(vocabulary) for vocabulary in old.values())  # from here on no tokenizer has a token
    base, one, two = (table[top:] for table in tables_of(zoo, names).values())
    close(out[TABLE][top:], base + 0.3 * (one - base) + 0.7 * (two - base))
    cut = lr.merge(made | {"tokenizer_source": None, "tokenizer": {"source": "base", "pad_to_multiple_of": 1}}).result
    assert cut is not None
    count = len(old["base"])
    assert cut[TABLE].shape[0] == count
    close(cut[TABLE], out[TABLE][:count])


def test_one_vocabulary_changes_nothing(zoo, tmp_path):
    for name, seed in (("one", 1), ("two", 2)):
        model(tmp_path / name, bpe(TEXTS["base"], ADDED["base"]), seed=seed, rows=64)
    plain = recipe(tmp_path, "one", "two", base="one")
    before = lr.merge(plain).result
    assert before is not None
    for asked in ("base", "union"):
        report = lr.merge(plain | {"tokenizer_source": asked})
        assert report.vocabulary is not None
        assert report.vocabulary["tensors"] == {}
        assert report.result is not None
        assert all(torch.equal(tensor, before[name]) for name, tensor in report.result.items())


def test_a_model_with_a_head_unties_one_without(zoo, tmp_path):
    report = lr.merge(recipe(zoo, "math", base="base-tied", tokenizer_source="union"), tmp_path / "out")
    out, new = load_file(tmp_path / "out" / "model.safetensors"), ids(tmp_path / "out")
    assert report.config["tie_word_embeddings"] is False
    old = {name: ids(zoo / name) for name in ("math", "base-tied")}
    wanted = expected(tables_of(zoo, ["math", "base-tied"], HEAD), old, new, len(new), "base-tied")
    close(out[HEAD], wanted["math"])


def test_slices_take_each_table_from_its_end(zoo, tmp_path):
    ends = {"math": [0, 1], "code": [1, 2]}
    slices = [[{"model": str(zoo / name), "layer_range": layers}] for name, layers in ends.items()]
    made = {"version": 1, "merge_method": "passthrough", "slices": [{"sources": s} for s in slices]}
    report = lr.merge(made | {"tokenizer_source": "union"}, tmp_path / "out")
    assert {t.name: t.state for t in report.tensors if t.name in (TABLE, HEAD, NORM)} == {
        TABLE: "aligned", HEAD: "aligned", NORM: "copied",
    }  # fmt: skip
    out, new = load_file(tmp_path / "out" / "model.safetensors"), ids(tmp_path / "out")
    for table, name in ((TABLE, "math"), (HEAD, "code")):
        wanted = expected(tables_of(zoo, [name], table), {name: ids(zoo / name)}, new, len(new), None)
        assert torch.equal(out[table], wanted[name])


def test_tables_that_are_not_merged_are_aligned(zoo):
    made = recipe(zoo, "math", "code", tokenizer_source="union", targets={"exclude": ["embed|head"]})
    report, plan = lr.merge(made), plan_merge(made)
    assert report.states["aligned"] == 2
    old = {name: ids(zoo / name) for name in TEXTS}
    new = plan.vocabulary.chosen.ids
    wanted = expected(tables_of(zoo, list(TEXTS)), old, new, len(new), "base")
    assert report.result is not None
    assert torch.equal(report.result[TABLE], wanted["base"])


def test_dtypes_that_differ_are_merged_in_the_widest(zoo, tmp_path):
    tensors = load_file(zoo / "math" / "model.safetensors")
    rows = len(tensors[TABLE])
    config = CONFIG | {"vocab_size": rows}
    save(tmp_path / "half", {n: t.bfloat16() for n, t in tensors.items()}, config=config)
    AutoTokenizer.from_pretrained(zoo / "math").save_pretrained(tmp_path / "half")
    made = recipe(zoo, "base", base="base", tokenizer_source="union", dtype="float32")
    made["models"].append({"model": str(tmp_path / "half"), "parameters": {"weight": 0.7}})
    out, new = lr.merge(made).result, plan_merge(made).vocabulary.chosen.ids
    tables = {"base": tables_of(zoo, ["base"])["base"], "half": tensors[TABLE].bfloat16().float()}
    old = {"base": ids(zoo / "base"), "half": ids(tmp_path / "half")}
    wanted = expected(tables, old, new, len(new), "base")
    assert out is not None
    close(out[TABLE], lr.merge_tensors("linear", list(wanted.values()), weights=[0.3, 0.7]))


def test_a_lora_goes_onto_a_model_before_its_rows_are_put_in_order(zoo, tmp_path):
    tensors = load_file(zoo / "math" / "model.safetensors")
    tuned = save(tmp_path / "tuned", finetuned(tensors, rank=2), config=CONFIG | {"vocab_size": len(tensors[TABLE])})
    lr.extract(zoo / "math", tuned, tmp_path / "lora", rank=2, embeddings="lora")
    AutoTokenizer.from_pretrained(zoo / "math").save_pretrained(tuned)
    made = recipe(zoo, "code", tokenizer_source="union")
    results = []
    for other in (f"{zoo / 'math'}+{tmp_path / 'lora'}", str(tuned)):
        entry = {"model": other, "parameters": {"weight": 0.7}}
        results.append(lr.merge(made | {"models": [*made["models"], entry]}).result)
    for name in (TABLE, HEAD, QUERY):
        torch.testing.assert_close(results[0][name], results[1][name], rtol=1e-4, atol=1e-4)


def test_numbers_of_tokens_in_configs_follow_them(zoo, tmp_path):
    model(tmp_path / "other", words(["<unk>", "the", "</s>", "<s>", "cat"]), seed=7)
    made = recipe(zoo, "math", tokenizer_source=str(tmp_path / "other"))
    made["models"].append({"model": str(tmp_path / "other"), "parameters": {"weight": 0.5}})
    lr.merge(made, tmp_path / "out")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert (config["bos_token_id"], config["eos_token_id"], config["vocab_size"]) == (3, 2, 5)
    generation = json.loads((tmp_path / "out" / "generation_config.json").read_text())
    assert generation == {"eos_token_id": [2], "max_new_tokens": 5}
    assert ids(tmp_path / "out") == ids(tmp_path / "other")
    model(tmp_path / "poor", words(["<unk>", "the"]), seed=8)
    poor = made | {"models": [{"model": str(tmp_path / "poor"), "parameters": {"weight": 1}}]}
    report = lr.merge(poor | {"tokenizer_source": str(tmp_path / "poor")})
    assert report.config["eos_token_id"] is None
    assert any("eos_token_id" in note for note in report.notes)
    assert any("tokens of" in note and "not in the result" in note for note in report.notes)


def test_a_tokenizer_of_no_model_may_be_taken(zoo, tmp_path):
    words(["<unk>", "the", "<s>", "</s>"]).save_pretrained(tmp_path / "alone")
    made = recipe(zoo, "math", tokenizer_source=f"model:{tmp_path / 'alone'}")
    report = lr.merge(made, tmp_path / "out")
    assert ids(tmp_path / "out") == ids(tmp_path / "alone")
    assert report.vocabulary["tensors"][TABLE]["zero"]["rows"] == 1  # <unk>


def test_a_resumed_merge_gives_the_same_bytes(zoo, tmp_path):
    class Stopped(Exception):
        pass

    def stop(progress: Any) -> None:
        raise Stopped

    made = recipe(zoo, "math", "code", tokenizer_source="union")
    with pytest.raises(Stopped):
        lr.merge(made, tmp_path / "resumed", progress=stop)
    assert not (tmp_path / "resumed").exists()
    lr.merge(made, tmp_path / "resumed", resume=True)
    lr.merge(made, tmp_path / "whole")
    found, wanted = contents(tmp_path / "resumed"), contents(tmp_path / "whole")
    assert found.keys() == wanted.keys()
    for name in ("model.safetensors", "tokenizer.json", "config.json"):
        assert found[name] == wanted[name]


CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Yes?"}, {"role": "user", "content": "Go"}]
SYSTEM = [{"role": "system", "content": "Be kind"}, *CHAT]
RENDERED = {
    "chatml": "<|im_start|>system\nBe kind<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    "Yes?<|im_end|>\n<|im_start|>user\nGo<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe kind<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nYes?<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nGo<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s> [INST] Be kind\n\nHi [/INST] Yes?</s> [INST] Go [/INST]",
    "alpaca": "Be kind\n\n### Instruction:\nHi\n\n### Response:\nYes?\n\n### Instruction:\nGo\n\n### Response:\n",
    "exaone": "[|system|]Be kind[|endofturn|]\n[|user|]Hi\n[|assistant|]Yes?[|endofturn|]\n[|user|]Go\n[|assistant|]",
}


@pytest.mark.parametrize("name", FORMATS)
def test_a_well_known_chat_template_gives_its_format(zoo, tmp_path, name):
    lr.merge(recipe(zoo, "base", chat_template=name), tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer.apply_chat_template(SYSTEM, tokenize=False, add_generation_prompt=True) == RENDERED[name]


def test_a_chat_template_is_taken_from_where_the_recipe_says(zoo, tmp_path):
    for name, text in (("one", "{{ 1 }}"), ("two", "{{ 2 }}"), ("three", "{{ 2 }}"), ("none", None)):
        tokenizer = bpe(TEXTS["base"], [])
        tokenizer.chat_template = text
        model(tmp_path / name, tokenizer, seed=1)
    (tmp_path / "two" / "chat_template.jinja").unlink()
    settings = tmp_path / "two" / "tokenizer_config.json"
    settings.write_text(json.dumps(json.loads(settings.read_text()) | {"chat_template": "{{ 2 }}"}))
    made = recipe(tmp_path, "none", "two", "three", base="one")
    cases = {"auto": "{{ 2 }}", "base": "{{ 1 }}", "{{ 3 }}": "{{ 3 }}", str(tmp_path / "three"): "{{ 2 }}"}
    for asked, text in cases.items():
        for more in ({}, {"tokenizer_source": str(tmp_path / "two")}):
            lr.merge(made | {"chat_template": asked} | more, tmp_path / "out", overwrite=True)
            assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == text
    with pytest.raises(LrmergeError, match="no chat template"):
        lr.merge(made | {"chat_template": str(tmp_path / "none")})


def test_plan_manifest_and_terminal_say_what_was_done(zoo, tmp_path):
    made = recipe(zoo, "math", "code", tokenizer_source="union")
    path = tmp_path / "recipe.yaml"
    path.write_text(yaml.safe_dump(made))
    planned = json.loads(lrmerge("plan", path, "--json").out)
    dry, done = lrmerge("plan", path), lrmerge("merge", path, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "lrmerge.json").read_text())
    assert planned["vocabulary"] == written["vocabulary"]
    assert planned["vocabulary"]["left_out"] == {str(zoo / name): 0 for name in TEXTS}
    counts = planned["vocabulary"]["tensors"][HEAD]
    assert sum(kind["rows"] for kind in counts.values()) == planned["vocabulary"]["rows"]
    for shown in (dry.err, done.err):
        for kind, found in counts.items():
            assert f"{found['rows']} {kind}" in shown
        assert "plain tokens" in shown
    out = load_file(tmp_path / "out" / "model.safetensors")
    sizes = {tensor["name"]: tensor["bytes"] for tensor in planned["tensors"]}
    assert sizes == {name: tensor.nbytes for name, tensor in out.items()}


def test_ranges_of_rows():
    assert in_ranges(torch.tensor([True, True, False, True])) == "0-1, 3"
    assert in_ranges(torch.arange(100) % 2 == 0, most=2) == "0, 2, 48 more ranges"


def test_a_model_without_a_tokenizer_is_taken_to_have_the_first_ones(zoo, tmp_path):
    rows = len(ids(zoo / "base"))
    model(tmp_path / "bare", None, seed=4, rows=rows)
    made = recipe(zoo, "math", tokenizer_source="base")
    made["models"].append({"model": str(tmp_path / "bare"), "parameters": {"weight": 0.7}})
    report = lr.merge(made)
    assert any("has no tokenizer" in note for note in report.notes)
    old = {name: ids(zoo / name) for name in ("base", "math")}
    own = load_file(tmp_path / "bare" / "model.safetensors")[TABLE]
    tables = tables_of(zoo, ["math", "base"])
    wanted = expected(tables, old, old["base"], rows, "base")
    close(report.result[TABLE], lr.merge_tensors("linear", [wanted["math"], own], weights=[0.3, 0.7]))
    model(tmp_path / "odd", None, seed=4, rows=rows + 3)
    made["models"][-1]["model"] = str(tmp_path / "odd")
    with pytest.raises(LrmergeError, match="put its tokenizer beside it"):
        lr.merge(made)


def test_what_cannot_be_done_is_one_line(zoo, tmp_path):
    def line(*models: str, code: int, out: str = "recipe.yaml", words: tuple[str, ...], **more: Any) -> None:
        path = tmp_path / out
        path.write_text(yaml.safe_dump(recipe(zoo, *models, **more)))
        refused("merge", path, tmp_path / "out", "-q", code=code, words=words, out=tmp_path / "out")

    line("math", code=1, words=("vocabularies differ", "tokenizer_source: union"))
    line("math", code=2, words=("'nowhere'", "union"), tokenizer_source="nowhere")
    missing = {"x": {"source": {"kind": "model_token", "model": str(zoo / "math"), "token": "no"}}}
    line("math", code=2, words=("no token 'no'", "tokens.x"), tokenizer={"tokens": missing})
    beyond = {"x": {"source": {"kind": "model_token", "model": str(zoo / "math"), "token_id": 999}}}
    line("math", code=1, words=("rows", "999", "'x'"), tokenizer={"tokens": beyond})
    line("math", code=2, words=("at least 1",), tokenizer={"source": "base", "pad_to_multiple_of": 0})
    (tmp_path / "broken").mkdir()
    for file in (zoo / "math").iterdir():
        end = 100 if file.name == "tokenizer.json" else None
        (tmp_path / "broken" / file.name).write_bytes(file.read_bytes()[:end])
    line(str(tmp_path / "broken"), code=1, words=("cannot read its tokenizer",), tokenizer_source="union")
    with patch.dict(sys.modules, {"transformers": None}):
        line("math", code=2, words=("transformers", "pip install"), tokenizer_source="union")


def test_other_tokens_in_as_many_rows_are_noted(zoo, tmp_path):
    model(tmp_path / "one", words(["<unk>", "a", "b"]), seed=1)
    model(tmp_path / "two", words(["<unk>", "b", "a"]), seed=2)
    report = lr.merge(recipe(tmp_path, "two", base="one"))
    assert any("different vocabularies" in note and "tokenizer_source" in note for note in report.notes)
    assert not lr.merge(recipe(zoo, "base")).notes


WITH_MERGEKIT: dict[str, dict[str, Any]] = {
    "union": {"tokenizer_source": "union"},
    "base": {"tokenizer_source": "base"},
    "a model": {"tokenizer_source": "CODE"},
    "a task vector": {"tokenizer_source": "union", "merge_method": "task_arithmetic"},
    "ties": {"tokenizer_source": "union", "merge_method": "ties"},
    "tied": {"tokenizer_source": "union", "end": "-tied"},
    "no base": {"tokenizer_source": "union", "base_model": None},
    "rows without a token": {"tokenizer": {"source": "base", "pad_to_multiple_of": 1}, "end": "-padded"},
    "a multiple": {"tokenizer": {"source": "union", "pad_to_multiple_of": 32}},
    "tokens": {
        "tokenizer": {
            "source": "union",
            "tokens": {
                "<think>": {"source": {"kind": "zero"}},
                "<call>": {"source": "CODE", "force": True},
                NEVER: {"source": {"kind": "model_token", "model": "MATH", "token": "<think>"}},
                "<newer>": {"source": {"kind": "model_token", "model": "CODE", "token_id": 3}},
                "<both>": {"source": "MATH", "force": True},
            },
            "pad_to_multiple_of": 8,
        }
    },
}


def test_equals_mergekit(zoo, tmp_path):
    """The same recipes in mergekit's own environment, in float32: the same tokens, each with the same rows."""
    if "LRMERGE_MERGEKIT" not in os.environ:
        pytest.skip("LRMERGE_MERGEKIT is not set: the path of mergekit-yaml in an environment that has mergekit")
    python = Path(os.environ["LRMERGE_MERGEKIT"]).parent / "python"
    runs = []
    for name, given in WITH_MERGEKIT.items():
        own = dict(given)
        end = own.pop("end", "")
        method = own.get("merge_method", "linear")
        made = recipe(zoo, f"math{end}", f"code{end}", base=f"base{end}", method=method, dtype="float32") | own
        if method == "linear" and made["base_model"] is not None:  # mergekit averages the base too; here all are listed
            made["models"].append({"model": made["base_model"], "parameters": {"weight": 0.4}})
        text = json.dumps({key: value for key, value in made.items() if key != "version" and value is not None})
        text = text.replace('"MATH"', json.dumps(str(zoo / "math"))).replace('"CODE"', json.dumps(str(zoo / "code")))
        runs.append((json.loads(text), str(tmp_path / name)))
    (tmp_path / "runs.json").write_text(json.dumps(runs))
    script = Path(__file__).with_name("merge_with_mergekit.py")
    done = subprocess.run([python, script, tmp_path / "runs.json"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    for made, theirs in runs:
        ours = f"{theirs} of ours"
        lr.merge(made, ours)
        mine, its = ids(Path(ours)), ids(Path(theirs))
        assert mine.keys() == its.keys()
        found, wanted = (load_file(Path(folder) / "model.safetensors") for folder in (ours, theirs))
        assert_equal(found, wanted, mine, its, Path(theirs).name)
        sizes = [json.loads((Path(folder) / "config.json").read_text())["vocab_size"] for folder in (ours, theirs)]
        assert sizes[0] == sizes[1]


def assert_equal(found: Tensors, wanted: Tensors, mine: dict[str, int], its: dict[str, int], name: str) -> None:
    """Every tensor equal, tables row by row of the same token: mergekit numbers new tokens in no fixed order."""
    assert found.keys() == wanted.keys()
    tokens = sorted(mine)
    for tensor in found:
        ours, theirs = found[tensor], wanted[tensor]
        assert ours.shape == theirs.shape
        if tensor in (TABLE, HEAD):
            padding = list(range(len(tokens), len(ours)))
            ours = ours[[*(mine[token] for token in tokens), *padding]]
            theirs = theirs[[*(its[token] for token in tokens), *padding]]
        torch.testing.assert_close(ours, theirs, rtol=2e-5, atol=2e-5, msg=lambda m, n=tensor: f"{name}: {n}: {m}")
