"""Cards of every verb: what the Hub reads of them, what they show, and that what they say to run does what it says."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path
from xml.etree import ElementTree

import pytest
import tiny
import yaml
from hub_server import Repository, hub
from huggingface_hub import ModelCard
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import validate_repo_id
from markdown_it import MarkdownIt
from results import ADAPTERS, MODELS, REVISION, blocks, cached, working_in
from safetensors.torch import load_file, save

import mergekit_lr as lr
from mergekit_lr.methods.registry import methods
from mergekit_lr.report.citations import COMPRESS, EXTRACT, PAPERS, SPACES, bibtex
from mergekit_lr.report.inputs import Input

RELATIONS = ("adapter", "merge", "finetune", "quantized")


@pytest.mark.parametrize("name", [*ADAPTERS, *MODELS])
def test_the_hub_reads_the_metadata(world, name):
    text = world.card(name)
    assert REGEX_YAML_BLOCK.match(text)
    data = ModelCard.load(world.results[name] / "README.md").data
    assert isinstance(data.base_model, list)
    for repo in data.base_model:
        validate_repo_id(repo)
    assert data.base_model_relation in RELATIONS
    assert data.base_model_relation == ("adapter" if name in ADAPTERS else "merge")
    assert data.library_name == ("peft" if name in ADAPTERS else "transformers")
    assert data.pipeline_tag == "text-generation"
    assert "lrmerge" in data.tags
    assert ("lora" in data.tags) == (name in ADAPTERS)
    assert data.license == "llama3.1"


def test_what_the_inputs_state_is_inherited_and_combined(world):
    data = ModelCard.load(world.results["merge"] / "README.md").data
    assert data.base_model == ["tiny/base", "tiny/math", "tiny/code"]
    assert data.language == ["en", "no", "de"]  # Norwegian, not false
    assert data.datasets == ["org/pile", "org/sums"]
    assert data.tags == ["lrmerge", "merge", "dare_ties"]
    assert "gated" in world.card("extract")
    assert f"revision `{REVISION[:12]}`" in world.card("extract")
    assert ModelCard.load(world.results["compress"] / "README.md").data.base_model == ["tiny/base"]


@pytest.mark.parametrize("name", [*ADAPTERS, *MODELS])
def test_no_path_of_this_disk_is_shown(world, name):
    assert str(world.here.parent) not in world.card(name)
    assert "snapshots" not in world.card(name)


@pytest.mark.parametrize("name", ADAPTERS[:-1])
def test_the_spectrum_is_a_small_picture_beside_the_card(world, name):
    [link] = re.findall(r"!\[[^]]+]\(([^)]+)\)", world.card(name)) or [None]
    if name == "convert":
        assert link is None  # nothing was decomposed
        return
    picture = world.results[name] / str(link)
    assert picture.stat().st_size < 20_000
    root = ElementTree.parse(picture).getroot()
    lines = root.findall("{http://www.w3.org/2000/svg}polyline")
    manifest = json.loads((world.results[name] / "lrmerge.json").read_text())
    kinds = {module["name"].split(".")[-2] for module in manifest["modules"] if module["rank"]}
    assert len(lines) == len(kinds)
    assert all(f"`{kind}`" in world.card(name) for kind in kinds)


def test_the_table_of_the_worst_is_capped_and_in_order(world):
    card = world.card("ranks")
    table = card[card.index("| module |") :].partition("\n\n")[0].splitlines()[2:]
    errors = [float(row.split("|")[-2]) for row in table]
    report = json.loads((world.results["ranks"] / "lrmerge.json").read_text())
    assert errors == sorted(errors, reverse=True)
    assert len(errors) == 8
    assert errors[0] == pytest.approx(max(module["error"] for module in report["modules"]), abs=1e-4)


@pytest.mark.parametrize("name", [*ADAPTERS, *MODELS])
def test_what_a_card_says_makes_the_same_again(world, name, tmp_path):
    card, here = world.card(name), tmp_path / "here"
    here.mkdir()
    for path in world.here.iterdir():
        (here / path.name).symlink_to(path.resolve())
    for recipe in blocks(card, "yaml", "Make it again"):
        (here / "recipe.yaml").write_text(recipe)
    [command] = blocks(card, "sh", "Make it again")
    program, *arguments = shlex.split(command.replace("\\\n", " "))
    assert program == "lrmerge"
    with working_in(here):
        ended = tiny.lrmerge(*arguments)
    assert ended.code == 0, ended
    for file in world.results[name].glob("*.safetensors"):
        again = load_file(here / "OUT" / file.name)
        assert again.keys() == load_file(file).keys()
        assert all(again[key].equal(tensor) for key, tensor in load_file(file).items())


def test_local_inputs_have_names_and_no_ids(tmp_path):
    base = tiny.decoder()
    sides = tiny.save(tmp_path / "my base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))
    lr.extract(*sides, tmp_path / "out", rank=2)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert "base_model" not in card.data.to_dict()
    assert "license" not in card.data.to_dict()
    assert "Unknown: nothing that this was made from states a licence." in card.text
    assert 'from_pretrained("path/to/my base")' in card.text
    assert "lrmerge extract 'my base' tuned -o OUT" in card.text
    assert str(tmp_path) not in card.content


def test_tensors_in_memory_have_a_card_too(tmp_path):
    base = tiny.decoder()
    lr.extract(base, tiny.finetuned(base), tmp_path / "out", rank=2)
    assert "tensors in memory" in ModelCard.load(tmp_path / "out" / "README.md").text


@pytest.mark.parametrize(
    "name",
    [
        "<script>alert(1)<",
        "a|b`c",
        "x`` y",
        "-->\n---\n<!-- lrmerge:end -->",
        '");import os;("',
        "---",
        "\u202eeman",
        "$a$",
    ],
)  # fmt: skip
def test_names_of_folders_are_no_more_than_text(tmp_path, name):
    base = tiny.decoder()
    sides = tiny.save(tmp_path / "b" / name, base), tiny.save(tmp_path / "t" / name, tiny.finetuned(base))
    lr.extract(*sides, tmp_path / "o" / name, rank=2, embeddings="skip")
    card = ModelCard.load(tmp_path / "o" / name / "README.md")
    assert card.text.count("<!-- lrmerge:end -->") == 1
    assert card.text.rstrip().endswith("<!-- lrmerge:end -->")
    page = MarkdownIt("commonmark", {"html": True}).enable("table").render(card.text)
    assert "<script" not in page
    assert len(re.findall("<h1>", page)) == 1
    rows = re.findall(r"<tr>(.*?)</tr>", page[page.index("Made from") : page.index("Licence")], re.DOTALL)
    assert [row.count("<td>") for row in rows] == [0, 3, 3]
    for code in blocks(card.text, "python"):
        compile(code, "snippet", "exec")
    [command] = blocks(card.text, "sh", "Make it again")
    if name.isprintable():
        assert shlex.split(command)[2:4] == [name, name]
        code = next(block for block in blocks(card.text, "python") if "from_pretrained(" in block)
        [string] = re.findall(r'from_pretrained\(("path/to/.*")\)', code)
        assert json.loads(string) == f"path/to/{name}"


def test_a_broken_card_of_an_input_is_told_and_no_end(tmp_path):
    base = tiny.decoder()
    sides = tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))
    (sides[0] / "README.md").write_text("---\nlicense: [mit\n---\n")
    (sides[1] / "README.md").write_bytes(b"---\n" + b"[" * 5000 + b"\n---\n")
    report = lr.extract(*sides, tmp_path / "out", rank=2)
    assert [note.partition(":")[0] for note in report.notes] == ["base", "tuned"]
    assert all("cannot be read" in note for note in report.notes)


def test_licences_that_do_not_go_together_are_in_card_report_and_manifest(world, tmp_path):
    base = tiny.decoder()
    sides = tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))
    (sides[0] / "README.md").write_text("---\nlicense: apache-2.0\n---\n")
    (sides[1] / "README.md").write_text(
        "---\nlicense: other\nlicense_name: mine-noncommercial\nlicense_link: https://a.b/c\n---\n"
    )
    report = lr.extract(*sides, tmp_path / "out", rank=2)
    [note] = report.notes
    assert note.startswith("licence: mine-noncommercial allows no commercial use")
    assert note in json.loads((tmp_path / "out" / "lrmerge.json").read_text())["notes"]
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert (card.data.license, card.data.license_name, card.data.license_link) == (
        "other",
        "mine-noncommercial",
        "https://a.b/c",
    )
    assert "**Look at this:** mine-noncommercial allows no commercial use" in card.text


def test_a_card_edited_by_hand_survives_overwriting(tmp_path):
    base = tiny.decoder()
    sides = tiny.save(tmp_path / "base", base), tiny.save(tmp_path / "tuned", tiny.finetuned(base))
    out = tmp_path / "out"
    lr.extract(*sides, out, rank=2)
    card = out / "README.md"
    mine = b"\nMy own words, \xe9crits par moi.\r\n"  # not even in UTF-8
    card.write_bytes(card.read_bytes().replace(b"---\n", b"---\nmine: yes\n", 1) + mine)
    lr.extract(*sides, out, rank=3, overwrite=True)
    text = card.read_bytes()
    assert text.endswith(b"<!-- lrmerge:end -->\n" + mine)
    assert b"--rank 3" in text
    assert b"--rank 2" not in text
    assert b"\nmine: yes\n" in text
    (out / "lrmerge.json").unlink()  # now it is somebody else's folder, and goes as a whole
    lr.extract(*sides, out, rank=3, overwrite=True)
    assert b"My own words" not in card.read_bytes()


def test_every_method_has_its_paper():
    keys = {one.paper for one in methods().values()} | {EXTRACT, COMPRESS, *SPACES.values()}
    assert keys == PAPERS.keys()
    for key in keys:
        entry = bibtex([key, key])
        assert entry.count("@") == 1
        assert entry.count("{") == entry.count("}")
        assert re.match(r"@\w+\{[a-z0-9]+,\n", entry)
        assert PAPERS[key].title in entry


def test_the_methods_of_a_merge_are_cited(world):
    assert "Task Singular Vectors" not in world.card("merge")
    assert "Super Mario" in world.card("merge")
    assert "in Core Space" in world.card("adapters")
    assert "TIES-Merging" in world.card("adapters")
    assert "LoRA-Squeeze" in world.card("compress")
    assert blocks(world.card("convert"), "bibtex") == []


def test_a_licence_in_a_file_of_the_input_is_linked_to(tmp_path):
    card = "license: other\nlicense_name: mine\nlicense_link: LICENSE.md\n"
    found = Input.of("base", "org/base", cached(tmp_path, "org/base", tiny.decoder(), card))
    assert found.card["license_link"] == f"https://huggingface.co/org/base/blob/{REVISION}/LICENSE.md"


def test_files_of_image_tools_name_their_licence_in_their_metadata():
    found = Input.of("adapter", "x", Path("x.safetensors"), metadata={"modelspec.license": "CC-BY-SA-4.0"})
    assert found.card == {"license": "cc-by-sa-4.0"}
    found = Input.of("adapter", "x", Path("x.safetensors"), metadata={"modelspec.license": "Mine"})
    assert found.card == {"license": "other", "license_name": "Mine"}


def test_what_was_made_here_is_traced_to_the_hub(world, tmp_path):
    models = [{"model": str(world.results[name])} for name in ("apply", "merge")]
    lr.merge({"merge_method": "linear", "models": models}, tmp_path / "out")
    data = ModelCard.load(tmp_path / "out" / "README.md").data
    assert data.base_model == ["tiny/base", "tiny/math", "tiny/code"]
    assert data.license == "llama3.1"


def test_a_base_that_only_the_adapter_names_is_said_to_be_unread(world, tmp_path):
    lr.compress(world.results["extract"], tmp_path / "out", rank=1)
    adapters = [{"adapter": str(world.results[name])} for name in ("extract", "other")]
    lr.merge({"merge_method": "cat", "adapters": adapters}, tmp_path / "both")
    for out in ("out", "both"):
        card = ModelCard.load(tmp_path / out / "README.md")
        assert card.data.base_model == ["tiny/base"]
        assert "The base `tiny/base` was not read. Its licence may set terms as well." in card.text
    assert "was not read" not in world.card("compress") + world.card("adapters")


def test_a_revision_that_was_asked_for_stays_in_the_command(world, tmp_path):
    found = Input.of("base", "tiny/base@v1.0", world.snapshot("tiny/base"))
    assert (found.address, found.name) == ("tiny/base@v1.0", "tiny/base")
    assert Input.of("fine-tune", "memory", None).address == "FINE-TUNE"


def test_models_of_the_hub_are_known_by_their_ids(tmp_path):
    base, config = tiny.decoder(), json.dumps(tiny.CONFIG).encode()
    readme = b"---\nlicense: gemma\n---\n"
    files = {"config.json": config, "model.safetensors": save(base), "README.md": readme}
    tuned = {"config.json": config, "model.safetensors": save(tiny.finetuned(base))}
    repositories = {"org/base": Repository({"main": tuned, "v1.0": files}), "org/tuned": Repository({"main": tuned})}
    with hub(repositories) as server:
        clean = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "HUGGING"))}
        settings = {"HF_HOME": str(tmp_path / "cache"), "HF_ENDPOINT": server.endpoint, "OMP_NUM_THREADS": "1"}
        command = [sys.executable, "-m", "lrmerge", "extract", "org/base@v1.0", "org/tuned", "-o", "out", "-q"]
        subprocess.run(command, check=True, cwd=tmp_path, env=clean | settings)
    card = ModelCard.load(tmp_path / "out" / "README.md")
    assert card.data.base_model == ["org/base"]
    assert card.data.license == "gemma"
    assert 'from_pretrained("org/base", revision="v1.0")' in card.text
    assert "lrmerge extract org/base@v1.0 org/tuned -o OUT" in card.text
    assert str(tmp_path) not in card.content


def test_a_recipe_of_several_documents_is_shown_whole_and_runs(world, tmp_path):
    recipe = (
        "name: one\nmerge_method: linear\nmodels:\n- model: tiny/base\n- model: tiny/math\n---\n"
        "name: two\nmerge_method: linear\nmodels:\n- model: one\n- model: tiny/code\n---\n"
        "merge_method: slerp\nbase_model: one\nmodels:\n- model: one\n- model: two\nparameters:\n  t: 0.3\n"
    )
    here = tmp_path / "here"
    here.mkdir()
    (here / "tiny").symlink_to(world.here / "tiny")
    (here / "recipe.yaml").write_text(recipe)
    with working_in(here):
        assert tiny.lrmerge("merge", "recipe.yaml", "out", "-q").code == 0
        card = (here / "out" / "README.md").read_text()
        [shown] = blocks(card, "yaml", "Make it again")
        assert list(yaml.safe_load_all(shown)) == list(yaml.safe_load_all(recipe))
        (here / "again.yaml").write_text(shown)
        assert tiny.lrmerge("merge", "again.yaml", "again", "-q").code == 0
        first, second = (load_file(here / name / "model.safetensors") for name in ("out", "again"))
    assert all(second[key].equal(tensor) for key, tensor in first.items())
    assert not (here / "out.parts").exists()
