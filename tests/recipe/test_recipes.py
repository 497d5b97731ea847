"""Recipes: what parameters mean, what mergekit's files may hold, and the one line that every mistake gives."""

from __future__ import annotations

from pathlib import Path

import pytest
from tiny import decoder, finetuned, refused, save

from mergekit_lr.errors import LrmergeError
from mergekit_lr.methods.registry import Parameter, find
from mergekit_lr.recipe.parameters import arguments, value_of
from mergekit_lr.recipe.reading import read_recipes

NUMBER = Parameter("t", "number", None, True)
FLAG = Parameter("normalize", "flag", False, False)
COUNT = Parameter("rank", "integer", None, False)


@pytest.mark.parametrize(
    ("setting", "t", "wanted"),
    [
        (0.5, 0.3, 0.5),
        ([0, 1], 0.25, 0.25),
        ([0, 1, 0], 0.5, 1.0),
        ([0, 1, 0], 0.75, 0.5),
        ([2], 0.9, 2.0),
        ("1e-5", 0.0, 1e-5),
        ([{"filter": "mlp", "value": [0, 4]}, {"value": 3}], 0.5, 2.0),
        ([{"filter": "attn", "value": 1}, {"filter": "*", "value": 3}], 0.5, 3),
        ([{"filter": "mlp", "value": 1}, {"filter": "layers.1", "value": 2}], 0.5, 1),  # the first that fits
        ([{"filter": "attn", "value": 1}], 0.5, None),
        ([{"filter": r"re:layers\.\d\.mlp", "value": 7}], 0.5, 7),
        ({"filter": "mlp", "value": 6}, 0.0, 6),
    ],
)
def test_values_of_settings(setting, t, wanted):
    assert value_of(setting, "model.layers.1.mlp.up_proj.weight", t, NUMBER) == wanted


def test_what_is_no_number_is_stepped_and_ranks_are_whole():
    assert [value_of([True, False], "x", t, FLAG) for t in (0, 0.4, 0.9, 1)] == [True, True, True, False]
    assert [value_of([8, 64], "x", t, COUNT) for t in (0, 0.5, 1)] == [8, 36, 64]


def test_the_narrowest_scope_wins():
    own = [{"weights": 0.1}, {}]
    found = arguments(
        find("ties"), own, [{"density": 0.5}, {"weights": 0.7, "density": 0.2, "scale": 2}], ["x"] * 2, "x", 0
    )
    assert found == {"weights": [0.1, 0.7], "density": [0.5, 0.5], "scale": 2}


def test_a_parameter_of_some_models_only_has_its_default_for_the_others():
    found = arguments(find("ties"), [{"density": 0.3}, {}], [{}], ["x", "y"], "x", 0)
    assert found == {"density": [0.3, 1.0]}


def written(folder: Path, text: str) -> Path:
    path = folder / "recipe.yaml"
    path.write_text(text)
    return path


GOOD = """\
merge_method: ties
base_model: {model: {path: org/base, revision: main}}
models:
  - model: org/a+org/lora
    parameters:
      weight: [0.2, 0.8]
      density: 0.5
  - model: {model: {path: org/b}, lora: {path: org/c, revision: v1}}
    parameters: {weight: 1e-1, density: [{filter: mlp, value: 0.5}, {value: 0.2}]}
parameters: {normalize: true, lambda: 1.0, int8_mask: true}
dtype: bfloat16
"""


def test_a_recipe_of_mergekits_is_read_as_it_is(tmp_path):
    [recipe] = read_recipes(written(tmp_path, GOOD))
    assert recipe.references == ["org/base@main", "org/a+org/lora", "org/b+org/c@v1"]
    assert recipe.notes == ()


def test_what_mergekit_would_ignore_is_a_note_with_its_line(tmp_path):
    [recipe] = read_recipes(written(tmp_path, GOOD + "dtpe: float32\n"))
    assert len(recipe.notes) == 1
    assert "line 12" in recipe.notes[0]
    assert "did you mean 'dtype'" in recipe.notes[0]


def test_without_version_methods_compute_as_mergekit_does(tmp_path):
    text = GOOD.replace("ties", "breadcrumbs")
    assert read_recipes(written(tmp_path, text))[0].shared["compat"] == "mergekit"
    strict = text.replace(", int8_mask: true", "") + "version: 1\n"
    assert "compat" not in read_recipes(written(tmp_path, strict))[0].shared


PLAIN = """\
version: 1
merge_method: ties
base_model: BASE
models:
  - model: BASE
  - model: TUNED
    parameters: {weight: 0.5}
parameters:
  density: 0.5
"""
ADAPTERS = """\
version: 1
merge_method: ties
space: core
adapters:
  - adapter: LORA
  - adapter: LORA
"""
SLICES = """\
merge_method: passthrough
slices:
  - sources:
      - {model: BASE, layer_range: [0, 2]}
  - sources:
      - {model: TUNED, layer_range: [1, 2]}
"""
MODULES = """version: 1
merge_method: ties
base_model: BASE
modules:
  layers:
    models: [{model: TUNED}]
  default:
    parameters: {density: 0.5}
    models: [{model: TUNED}]
"""


def before(line: str) -> tuple[str, str]:
    """A line put before the parameters, as line 8."""
    return "parameters:\n", f"{line}\nparameters:\n"


def beside(layers: str) -> tuple[str, str]:
    """One more source in the second slice, with these layers."""
    entry = "      - {model: TUNED"
    return entry, f"      - {{model: BASE, layer_range: {layers}}}\n{entry}"


# What is replaced by what in which recipe, and words of the line that this gives.
BAD = {
    "no yaml": (PLAIN, "ties", "[", ("line", "no YAML")),
    "empty": (PLAIN, PLAIN, "# nothing\n", ("empty",)),
    "a list": (PLAIN, PLAIN, "- 1\n", ("mapping",)),
    "twice": (PLAIN, "base_model: BASE", "version: 1", ("line 3", "twice")),
    "version": (PLAIN, "version: 1", "version: 2", ("line 1", "version", "1")),
    "unknown key": (PLAIN, "base_model:", "base_mdel:", ("line 3", "base_mdel", "did you mean 'base_model'")),
    "unknown key of a model": (PLAIN, "- model: TUNED", "- modl: TUNED", ("line 6", "did you mean 'model'")),
    "no method": (PLAIN, "merge_method: ties\n", "", ("merge_method", "missing")),
    "unknown method": (PLAIN, "ties", "tise", ("line 2", "did you mean 'ties'")),
    "unknown parameter": (PLAIN, "density: 0.5", "densty: 0.5", ("line 9", "did you mean 'density'")),
    "unknown parameter of a model": (PLAIN, "weight: 0.5", "wight: 0.5", ("line 7", "did you mean 'weights'")),
    "global parameter of a model": (PLAIN, "weight: 0.5", "normalize: true", ("line 7", "normalize", "all models")),
    "out of range": (PLAIN, "density: 0.5", "density: 1.5", ("line 9", "from 0 to 1", "1.5")),
    "no number": (PLAIN, "density: 0.5", "density: much", ("line 9", "number", "much")),
    "no flag": (PLAIN, "density: 0.5", "normalize: 3", ("line 9", "true or false", "3")),
    "no choice": (PLAIN, "density: 0.5", "majority: mean", ("line 9", "'sum', 'count'", "mean")),
    "gradient out of range": (PLAIN, "density: 0.5", "density: [0.5, 2]", ("line 9", "from 0 to 1", "2")),
    "empty gradient": (PLAIN, "density: 0.5", "density: []", ("line 9", "empty")),
    "mixed gradient": (PLAIN, "density: 0.5", "density: [0.5, {value: 1}]", ("line 9", "not both")),
    "nested gradient": (PLAIN, "density: 0.5", "density: [[0.5]]", ("line 9", "list inside a list")),
    "filter without value": (PLAIN, "density: 0.5", "density: [{filter: mlp}]", ("line 9", "mlp", "value")),
    "filter with more": (PLAIN, "density: 0.5", "density: [{filtr: mlp, value: 1}]", ("line 9", "filtr")),
    "filter is a number": (PLAIN, "density: 0.5", "density: [{filter: 3, value: 1}]", ("line 9", "filter", "3")),
    "filter is no expression": (PLAIN, "density: 0.5", "density: [{filter: 're:(', value: 1}]",
                                ("line 9", "no regular expression")),
    "parameters is a list": (PLAIN, "  density: 0.5", "  - density", ("line 8", "parameters", "dictionary")),
    "missing parameter": (PLAIN, "ties", "nearswap", ("line", "'t'")),
    "models and slices": (PLAIN, *before("slices: [{sources: [{model: a, layer_range: [0, 1]}]}]"),
                          ("exactly one", "models and slices")),
    "nothing to merge": (PLAIN, "models:\n  - model: BASE\n  - model: TUNED\n    parameters: {weight: 0.5}\n", "",
                         ("exactly one", "none")),
    "a module without models": (MODULES, "models: [{model: TUNED}]", "parameters: {density: 1}",
                                ("line 5", "modules.layers", "either models or slices")),
    "a key of a module": (MODULES, "parameters", "paramters", ("line 8", "did you mean 'parameters'")),
    "a parameter of a module": (MODULES, "density", "densty", ("line 8", "did you mean 'density'")),
    "a module that is not there": (MODULES, "layers:", "vision_tower:", ("line 5", "vision_tower", "model.layers")),
    "tensors of no module": (MODULES, "default:", "norm:", ("line 4", "lm_head.weight", "default")),
    "no base": (PLAIN, "base_model: BASE\n", "", ("ties", "base_model")),
    "no such model": (PLAIN, "TUNED", "./nowhere", ("./nowhere", "no such")),
    "wrong dtype": (PLAIN, *before("dtype: int8"), ("line 8", "dtype", "int8")),
    "space of models": (PLAIN, *before("space: core"), ("line 8", "core", "adapters")),
    "unknown space": (ADAPTERS, "core", "outer", ("line 3", "space", "outer")),
    "space of another method": (ADAPTERS, "ties", "opcm", ("line 3", "opcm", "core")),
    "dense adapter": (ADAPTERS, "space: core\n", "", ("ties", "full rank", "space: core")),
    "adapters of a method on weights": (ADAPTERS, "ties\nspace: core", "model_stock", ("line 2", "models")),
    "factors of models": (PLAIN, "ties", "cat", ("line 2", "adapters")),
    "adapter out of models": (PLAIN, *before("output: {kind: adapter}"), ("line 8", "extract")),
    "two limits": (ADAPTERS, "adapters:", "output: {rank: 2, energy: 0.9}\nadapters:", ("line 4", "rank", "one")),
    "rank 0": (ADAPTERS, "adapters:", "output: {rank: 0}\nadapters:", ("line 4", "rank", "0")),
    "shards of an adapter": (ADAPTERS, "adapters:", "output: {shard_size: 1GB}\nadapters:", ("line 4", "one file")),
    "model without base": (ADAPTERS, "adapters:", "output: {kind: model}\nadapters:", ("line 4", "base_model")),
    "adapters with a tokenizer": (ADAPTERS, "adapters:", "tokenizer_source: base\nadapters:", ("line 4", "tokenizer")),
    "nothing left": (ADAPTERS, "adapters:", "targets: {include: [nothing]}\nadapters:", ("line 4", "nothing")),
    "bad expression": (ADAPTERS, "adapters:", "targets: {exclude: ['(']}\nadapters:", ("line 4", "regular expression")),
    "a checkpoint as adapter": (ADAPTERS, "LORA", "BASE", ("error",)),
    "base of a slice": (SLICES, "  - sources:", "  - base_model: ./nowhere\n    sources:", ("./nowhere", "no such")),
    "a list as key": (PLAIN, "version: 1", "? [a]\n: 1", ("line 1", "key")),
    "a number as key": (PLAIN, "version: 1", "1: 1", ("string",)),
    "an endless alias": (PLAIN, "density: 0.5", "density: &a [*a]", ("line 9", "list inside a list")),
    "infinite": (PLAIN, "density: 0.5", "density: .nan", ("line 9", "from 0 to 1")),
    "range beyond the model": (SLICES, "[1, 2]", "[1, 9]", ("line 6", "2 layers")),
    "range backwards": (SLICES, "[1, 2]", "[2, 1]", ("line 6", "no range")),
    "range of three": (SLICES, "[1, 2]", "[1, 2, 3]", ("line 6", "2 items")),
    "ranges of unequal length": (SLICES, *beside("[0, 2]"), ("line 7", "first source")),
    "two models passed through": (SLICES, *beside("[0, 1]"), ("line 2", "merges 1", "got 2")),
    "union of tokenizers": (PLAIN, *before("tokenizer_source: union"), ("tokenizer.json",)),
    "tokens": (PLAIN, *before("tokenizer: {source: base, tokens: {a: {sorce: b}}}"),
               ("line 8", "tokens.a", "source")),
    "no source of a token": (PLAIN, *before("tokenizer: {tokens: {a: {source: {kind: none}}}}"),
                             ("line 8", "zero", "model_token")),
    "a token of another model": (PLAIN, *before("tokenizer: {tokens: {a: {source: c}}}"), ("line 8", "'c'", "none of")),
    "force is no flag": (PLAIN, *before("tokenizer: {tokens: {a: {force: 3}}}"), ("line 8", "force", "3")),
    "both tokenizers": (PLAIN, *before("tokenizer_source: base\ntokenizer: {source: base}"), ("line 8",)),
    "chat template": (PLAIN, *before("chat_template: autos"), ("line 8", "autos", "chatml")),
    "documents without a name": (PLAIN, "version: 1", "merge_method: linear\nmodels: [{model: BASE}]\n---", ("name",)),
}  # fmt: skip


# Not the recipe's fault but its inputs'.
INPUTS = ("no yaml", "empty", "no such model", "base of a slice", "union of tokenizers", "a checkpoint as adapter")
REFUSED_AS = dict.fromkeys(INPUTS, 1)


@pytest.fixture(scope="module")
def given(tmp_path_factory) -> dict[str, str]:
    """A base, a fine-tune and a LoRA."""
    import mergekit_lr as lr

    folder = tmp_path_factory.mktemp("given")
    base = decoder()
    save(folder / "base", base)
    save(folder / "tuned", finetuned(base, rank=2))
    lr.extract(folder / "base", folder / "tuned", folder / "lora", rank=2, embeddings="skip", rest="skip")
    return {"BASE": str(folder / "base"), "TUNED": str(folder / "tuned"), "LORA": str(folder / "lora")}


def filled(text: str, given: dict[str, str]) -> str:
    for word, path in given.items():
        text = text.replace(word, path)
    return text


@pytest.mark.parametrize("name", BAD)
def test_a_bad_recipe_is_one_line(given, tmp_path, name):
    text, old, new, words = BAD[name]
    assert old in text
    path = written(tmp_path, filled(text.replace(old, new, 1), given))
    line = refused(
        "merge", path, tmp_path / "out", "-q", code=REFUSED_AS.get(name, 2), words=words, out=tmp_path / "out"
    )
    assert "Traceback" not in line


@pytest.mark.parametrize("text", [PLAIN, ADAPTERS, SLICES], ids=["models", "adapters", "slices"])
def test_the_recipes_that_were_spoilt_are_good(given, tmp_path, text):
    import mergekit_lr as lr

    lr.merge(written(tmp_path, filled(text, given)), tmp_path / "out")
    assert (tmp_path / "out" / "lrmerge.json").exists()


def test_a_recipe_that_is_not_there(tmp_path):
    with pytest.raises(LrmergeError, match="no such file"):
        read_recipes(tmp_path / "none.yaml")


def test_a_mapping_is_a_recipe_and_its_errors_name_the_key():
    with pytest.raises(LrmergeError, match=r"models\.0\.parameters\.density"):
        read_recipes({"merge_method": "ties", "models": [{"model": "x", "parameters": {"density": 3}}]})


EXAMPLES = Path(__file__).resolve().parents[2] / "examples" / "recipes"


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.yaml")), ids=lambda path: path.stem)
def test_the_examples_are_good_recipes_and_in_their_readme(path):
    assert [recipe.notes for recipe in read_recipes(path)][-1] == ()
    assert f"`{path.name}`" in (EXAMPLES / "README.md").read_text()
