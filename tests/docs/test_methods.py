"""What is said of methods: complete, readable in a terminal of 80 columns, and true enough to be run."""

from __future__ import annotations

from pathlib import Path

import pytest
from docutils.utils.math.latex2mathml import tex2mathml
from formulas import tex
from rich.cells import cell_len
from tiny import CONFIG, decoder, finetuned, lrmerge, save
from world import _adapter

import mergekit_lr as lr
from mergekit_lr.methods.explanation import example, explain, reference
from mergekit_lr.methods.registry import methods

KNOWN = methods()


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> Path:
    """Models of one layer and adapters under the names that examples use."""
    folder = tmp_path_factory.mktemp("small")
    base = decoder(layers=1)
    config = CONFIG | {"num_hidden_layers": 1}
    save(folder / "org" / "base", base, config=config)
    for seed, task in enumerate(("math", "code"), start=1):
        save(folder / "org" / task, finetuned(base, seed=seed), config=config)
        _adapter(folder / "org" / f"{task}-lora", base, rank=8, seed=seed)
    return folder


@pytest.mark.parametrize("name", KNOWN)
def test_docstring_is_complete(name: str):
    method, said = KNOWN[name], explain(KNOWN[name])
    assert said.summary == method.description.replace("``", "")
    assert said.summary.endswith(".")
    assert said.parameters.keys() == {key for key, p in method.parameters.items() if p.kind != "tensor"}
    assert all([said.formula, said.use_when, said.not_when, said.cost, said.example, *said.parameters.values()])
    assert reference(method)[1].startswith("https://")


@pytest.mark.parametrize("name", KNOWN)
def test_formulas_are_typeset(name: str):
    for line in explain(KNOWN[name]).formula:
        made = tex2mathml(tex(line), as_block=True)
        assert "<math" in made
        assert "\\" not in made, line


@pytest.mark.parametrize("name", KNOWN)
def test_example_runs(name: str, small: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(small)
    path = small / f"{name}.yaml"
    path.write_text(f"version: 1\n{example(KNOWN[name])}")
    report = lr.merge(path)
    assert report.method == name
    assert report.states["merged"] > 0


@pytest.mark.parametrize("name", KNOWN)
def test_explanation_fits_a_terminal(name: str):
    shown = printed("methods", name)
    assert max(cell_len(line) for line in shown.splitlines()) <= 80
    said = explain(KNOWN[name])
    for words in (*said.parameters, "use when", "not when", "cost", "a recipe:", reference(KNOWN[name])[1]):
        assert words in shown, words
    assert said.formula[0] in " ".join(shown.split())


def test_list_has_every_method_with_its_paper_and_inputs():
    shown = printed("methods")
    rows = {line.split()[0]: line for line in shown.splitlines() if not line.startswith(" ")}
    for name, method in KNOWN.items():
        assert method.takes in rows[name]
        assert ("doi" if "/" in method.paper else method.paper) in rows[name]


def printed(*arguments: str) -> str:
    """What a command prints in a terminal of 80 columns."""
    outcome = lrmerge(*arguments, width=80)
    assert outcome.code == 0, outcome.err
    return outcome.out


def test_defaults_ranges_and_choices_are_shown():
    shown = " ".join(printed("methods", "ties").split())
    assert "density 1.0 the share of a tensor's elements that is kept" in shown
    assert "(0 to 1; per model)" in shown
    assert "(weighted | unweighted)" in shown
    assert "a recipe may say weight for weights, lambda for scale" in shown
    needed = " ".join(printed("methods", "slerp").split())
    assert "t needed where on the arc." in needed


def test_said_of_another_method_is_said_here_too():
    assert explain(KNOWN["dare_ties"]).parameters["density"] == explain(KNOWN["dare_linear"]).parameters["density"]
