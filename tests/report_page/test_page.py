"""The page about a result: what is on it, that its numbers are the manifest's, and that it can do no harm."""

from __future__ import annotations

import base64
import hashlib
import json
import math
import re
from importlib.resources import files
from itertools import pairwise
from pathlib import Path

import pytest
from parsed import Page
from tiny import lrmerge, refused

import mergekit_lr as lr
from mergekit_lr.errors import LrmergeError, UsageError
from mergekit_lr.report.extraction import ExtractReport, ModuleFigures
from mergekit_lr.report.manifest import manifest
from mergekit_lr.verbs import report as verb

VERBS = ("extract", "compress", "convert", "apply", "models", "adapters", "plain")
INPUTS = ("pairs-cosine", "pairs-opposite", "pairs-output", "pairs-input", "budget-chart")
INPUTS += ("interference-map", "signs-map", "output-map", "input-map", "cosine-map")
FIGURES = {
    "extract": ("energy-chart", "error-map", "change-map"),
    "compress": ("energy-chart", "error-map", "change-map"),
    "convert": ("change-map",),
    "apply": ("error-map", "change-map"),
    "models": ("change-map", *INPUTS),
    "adapters": ("change-map", *INPUTS),
    "plain": ("change-map",),
}
HOSTILE = "model.layers.0.</script><img src=x onerror=alert(1)>&\"'.weight"


@pytest.fixture(scope="session")
def pages(results, tmp_path_factory) -> dict[str, Page]:
    """The page of each result."""
    folder = tmp_path_factory.mktemp("pages")
    found = {name: lr.write_report(results / name, folder / f"{name}.html") for name in VERBS}
    return {name: Page(Path(report.path)) for name, report in found.items()}


def shaped(layers: int, kinds: dict[str, tuple[int, int]], rank: int, *, first: str = "") -> dict:
    """The manifest of an extraction of that shape, with decaying spectra. first: the name of its first module."""
    modules = []
    for layer in range(layers):
        for number, (kind, shape) in enumerate(kinds.items()):
            values = [(1 + 0.1 * number) * (i + 1) ** -(0.4 + 0.01 * layer) for i in range(2 * rank)]
            name = first if first and not modules else f"model.layers.{layer}.{kind}.weight"
            squares = [value * value for value in values]
            figures = ModuleFigures(
                name, "linear", shape, rank, rank * sum(shape), sum(squares), sum(squares[:rank]), 0.0, 1.0,
                tuple(values[:rank]),
            )  # fmt: skip
            modules.append(figures)
    report = ExtractReport(
        "out",
        "org/base",
        "org/tuned",
        "bfloat16",
        "config",
        tuple(modules),
        (),
        (),
        10**8,
        10**11,
        10**11,
        10**10,
        60.0,
    )
    return manifest("extract", {}, {"rank": rank}, report.to_json())


def written(folder: Path, content: object) -> Path:
    """A folder with that manifest."""
    folder.mkdir(exist_ok=True)
    (folder / "lrmerge.json").write_text(content if isinstance(content, str) else json.dumps(content))
    return folder


@pytest.mark.parametrize("name", VERBS)
def test_figures_of_every_verb(pages, name):
    assert tuple(sorted(pages[name].charts)) == tuple(sorted(FIGURES[name]))


@pytest.mark.parametrize("name", VERBS)
def test_figures_have_the_marks_that_they_say(pages, name):
    page = pages[name]
    said = {t.attributes["id"]: int(t.attributes["data-marks"]) for t in page.tags if "data-marks" in t.attributes}
    for figure, chart in page.charts.items():
        rows = chart["data"]["values"]
        lines = {row["kind"] for row in rows if row["first"]} if figure == "energy-chart" else rows
        assert said[figure] == len(lines) > 0


@pytest.mark.parametrize("name", VERBS)
def test_page_is_whole_for_keyboard_and_screen_reader(pages, name):
    page = pages[name]
    assert [len(page.all(landmark)) for landmark in ("header", "nav", "main", "h1")] == [1, 1, 1, 1]
    assert len(page.ids) == len(set(page.ids))
    assert page.all("html")[0].attributes["lang"] == "en"
    targets = [tag.attributes["href"] for tag in page.all("a")]
    assert targets[0] == "#main"
    assert {target.removeprefix("#") for target in targets} <= set(page.ids)
    for tag in page.tags:
        for key in ("aria-labelledby", "aria-describedby"):
            assert tag.attributes.get(key, page.ids[0]) in page.ids
        if tag.attributes.get("role") in ("img", "region"):
            assert tag.attributes["aria-label"]
    levels = [int(tag.name[1]) for tag in page.tags if re.fullmatch(r"h\d", tag.name)]
    assert all(after - before <= 1 for before, after in pairwise(levels))
    assert all("label" in tag.within for tag in page.all("select"))
    assert all(tag.attributes["scope"] in ("row", "col") for tag in page.all("th"))
    assert len(page.all("table")) == len(page.all("caption"))
    assert len(page.all("table")) > len(page.charts)


@pytest.mark.parametrize("name", VERBS)
def test_page_loads_nothing(pages, name):
    page = pages[name]
    assert not [tag for tag in page.tags if "src" in tag.attributes]
    assert {t.attributes["href"] for t in page.tags if not t.attributes.get("href", "#").startswith("#")} == {"data:,"}
    style = "".join(page.all("style")[0].text)
    assert "url(" not in style
    assert "@import" not in style
    policy = next(t.attributes["content"] for t in page.all("meta") if t.attributes.get("http-equiv"))
    assert policy.startswith("default-src 'none'")
    scripts = ["".join(tag.text) for tag in page.all("script") if "type" not in tag.attributes]
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts]
    assert re.findall(r"'sha256-(.*?)'", policy) == digests
    assert len(digests) == 2


@pytest.mark.parametrize("name", VERBS)
def test_page_names_no_folder_of_this_machine(pages, results, name):
    assert str(results.parent) not in pages[name].source


def test_errors_and_energies_are_the_manifests(pages, results):
    told = {m["name"]: m for m in json.loads((results / "extract" / "lrmerge.json").read_text())["modules"]}
    head, *rows = pages["extract"].table("All")
    assert len(rows) == len(told) == 16
    for kind, layer, shape, rank, norm, error, *energies in rows:
        prefix = "" if layer == "outside" else f"model.layers.{layer}."
        module = told[f"{prefix}{kind}.weight"]
        assert (shape, rank) == ("x".join(map(str, module["shape"])), str(module["rank"]))
        assert float(norm) == pytest.approx(math.sqrt(module["squared_norm"]), rel=1e-3)
        assert float(error) == pytest.approx(module["error"], abs=1e-4)
        for column, energy in zip(head[6:], energies, strict=True):
            known = module["singular_values"][: int(column.removeprefix("r = "))]
            share = sum(value * value for value in known) / module["squared_norm"]
            assert float(energy.removesuffix(" %")) == pytest.approx(100 * share, abs=0.011)


def test_map_and_table_of_errors_agree(pages):
    rows = pages["extract"].charts["error-map"]["data"]["values"]
    head, *lines = pages["extract"].table("Error")
    cells = {(line[0], kind): v for line in lines for kind, v in zip(head[1:], line[1:], strict=True) if v}
    drawn = {("outside" if row["layer"] == "-" else row["layer"], row["kind"]): row["shown"] for row in rows}
    assert cells == drawn


def test_curve_of_a_kind_is_that_of_all_its_layers_cut_alike(tmp_path):
    kinds = {"up": (64, 32), "down": (32, 64)}
    report = lr.write_report(written(tmp_path / "out", shaped(3, kinds, 8)))
    modules = shaped(3, kinds, 8)["modules"]
    rows = Page(Path(report.path)).charts["energy-chart"]["data"]["values"]
    ups = [m for m in modules if ".up." in m["name"]]
    for row in (row for row in rows if row["layer"] == "all" and row["kind"] == "up"):
        held = sum(value**2 for m in ups for value in m["singular_values"][: row["rank"]])
        assert row["energy"] == pytest.approx(held / sum(m["squared_norm"] for m in ups), abs=1e-4)
    assert sorted({row["rank"] for row in rows}) == [1, 2, 3, 4, 6, 8]


def test_budget_of_a_merge_has_its_inputs_and_itself(pages, results):
    told = json.loads((results / "models" / "lrmerge.json").read_text())
    head, *rows = pages["models"].table("Squared norm")
    assert head[-1] == "norm"
    assert [row[0] for row in rows] == ["math", "code", "talk", "merged"]
    wanted = [*told["similarity"]["norms"], told["totals"]["norm"]]
    assert [float(row[-1]) for row in rows] == pytest.approx(wanted, rel=1e-3)


def test_hostile_names_stay_names(tmp_path):
    content = shaped(2, {"up": (8, 8)}, 4, first=HOSTILE) | {"out": "<b>x</b>\x1b[31m", "notes": ["<script>1</script>"]}
    page = Page(Path(lr.write_report(written(tmp_path / "out", content)).path))
    assert not page.all("img")
    assert not [tag for tag in page.tags if any(key.startswith("on") for key in tag.attributes)]
    assert page.all("h1")[0].text == ["<b>x</b>\\x1b[31m"]
    assert "\x1b" not in page.source
    assert len(page.all("script")) == 2 + len(page.charts)
    kinds = {row["kind"] for row in page.charts["error-map"]["data"]["values"]}
    assert HOSTILE.removeprefix("model.layers.0.").removesuffix(".weight") in kinds


def test_page_of_a_large_model_is_small(tmp_path):
    attention = {f"self_attn.{p}_proj": (8192, 8192) for p in "qkvo"}
    inner = {f"mlp.{p}_proj": (28672, 8192) for p in ("gate", "up", "down")}
    report = lr.write_report(written(tmp_path / "out", shaped(80, attention | inner, 256)))
    assert report.figures == {"energy-chart": 7, "error-map": 560, "change-map": 560}
    assert report.nbytes < 3_000_000


def test_experts_are_one_row(tmp_path):
    experts = {f"mlp.experts.{i}.up": (16, 8) for i in range(40)}
    report = lr.write_report(written(tmp_path / "out", shaped(2, experts, 4)))
    page = Page(Path(report.path))
    assert report.figures["error-map"] == 2
    assert [row[:2] for row in page.table("All 80 modules")[1:]] == [["mlp.experts.*.up", str(i)] for i in range(2)]


def test_colours_have_contrast_in_light_and_dark():
    style = (files("mergekit_lr.report.page") / "page.css").read_text()
    tokens = {name: pair for name, *pair in re.findall(r"--([\w-]+): light-dark\((#\w{6}), (#\w{6})\)", style)}
    text = [(ink, on) for ink in ("ink", "ink-2", "accent") for on in ("paper", "page")] + [("ink", "note")]
    text += [("ink", f"step-{i}") for i in range(4)] + [("on-strong", f"step-{i}") for i in (4, 5, 6)]
    text += [("ink", f"fork-{i}") for i in range(1, 6)] + [("on-strong", "fork-0"), ("on-strong", "fork-6")]
    drawn = [(f"hue-{i}", "paper") for i in range(8)]
    for theme in (0, 1):
        for pairs, least in ((text, 4.5), (drawn, 3.0)):
            for ink, on in pairs:
                assert _contrast(tokens[ink][theme], tokens[on][theme]) >= least, (ink, on, theme)


def _contrast(one: str, other: str) -> float:
    """WCAG 2.2, relative luminance."""

    def luminance(colour: str) -> float:
        parts = [int(colour[i : i + 2], 16) / 255 for i in (1, 3, 5)]
        linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    low, high = sorted((luminance(one), luminance(other)))
    return (high + 0.05) / (low + 0.05)


def test_command_writes_beside_the_result(results, tmp_path):
    assert "opens in any browser" in lrmerge("report", results / "plain").out
    assert (results / "plain" / "report.html").is_file()
    outcome = lrmerge("report", results / "plain" / "lrmerge.json", "-o", tmp_path / "a.html", "--json")
    assert json.loads(outcome.out)["figures"] == {"change-map": 16}
    assert lrmerge("report", results / "plain", "--quiet").out == ""


def test_comparison_as_a_page(results, tmp_path):
    loras = [results / "in" / f"{name}-lora" for name in ("math", "code")]
    outcome = lrmerge("compare", *loras, "--json", "--report", tmp_path / "a.html")
    assert "wrote" in outcome.err
    (tmp_path / "compare.json").write_text(outcome.out)
    lr.write_report(tmp_path / "compare.json", tmp_path / "b.html")
    assert (tmp_path / "a.html").read_bytes() == (tmp_path / "b.html").read_bytes()
    page = Page(tmp_path / "a.html")
    assert sorted(page.charts) == sorted(INPUTS)
    told = json.loads(outcome.out)
    shown = [row[1:] for row in page.table("Cosine of each pair")[1:]]
    assert shown == [[f"{value:.4f}" for value in row] for row in told["cosine"]]


@pytest.mark.parametrize("name", ["extract", "compress", "file", "merge"])
def test_verbs_write_a_page_when_asked(results, tmp_path, name):
    base, tuned, lora = (results / "in" / part for part in ("base", "math", "math-lora"))
    image = ("--to", "kohya", "--component", "text_encoder")
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"merge_method: linear\nadapters: [{{adapter: {lora}}}, {{adapter: {results}/in/code-lora}}]\n")
    arguments = {
        "extract": ("extract", base, tuned, "-o", tmp_path / "out", "--rank", 2),
        "compress": ("compress", lora, "-o", tmp_path / "out", "--rank", 2),
        "file": ("compress", results / "in" / "layers-lora", "-o", tmp_path / "out.safetensors", "--rank", 2, *image),
        "merge": ("merge", recipe, tmp_path / "out"),
    }[name]
    outcome = lrmerge(*arguments, "--report")
    assert outcome.code == 0, outcome
    path = tmp_path / "out.html" if name == "file" else tmp_path / "out" / "report.html"
    charts = Page(path).charts
    assert ("interference-map" in charts) == (name == "merge")
    assert f"wrote {path}" in outcome.err


@pytest.mark.parametrize(
    ("content", "words"),
    [
        ("{", ("cannot be read as JSON",)),
        ("[1]", ("holds no manifest but a list",)),
        ({"format": 99, "verb": "extract"}, ("format 99", "newer")),
        ({"format": 1, "verb": "dance"}, ("verb", "damaged")),
        ({"format": 1, "verb": "extract", "modules": [{"name": "a", "rank": "x"}]}, ("modules.0.rank", "damaged")),
        ('{"format": 1, "verb": "extract", "modules": [{"name": "a", "squared_norm": NaN}]}', ("0.squared_norm",)),
        ({"names": ["a"], "cosine": 3}, ("damaged",)),
    ],
    ids=["torn", "list", "newer", "verb", "rank", "nan", "comparison"],
)  # fmt: skip
def test_damaged_manifests_are_refused(tmp_path, content, words):
    refused("report", written(tmp_path / "out", content), code=1, words=("lrmerge.json", *words))
    assert not (tmp_path / "out" / "report.html").exists()


def test_wrong_use_is_refused(results, tmp_path):
    refused("report", tmp_path, code=2, words=("lrmerge.json",))
    refused("report", results / "plain", "-o", tmp_path / "a.pdf", code=2, words=(".html",))
    refused("report", results / "plain", "-o", tmp_path / "none" / "a.html", code=2, words=("cannot be written",))
    with pytest.raises(UsageError, match=r"FILE\.html"):
        lr.write_report(lr.compare([results / "in" / "math-lora", results / "in" / "code-lora"]))


def test_missing_library_is_said_before_the_work(results, tmp_path, monkeypatch):
    monkeypatch.setattr(verb, "LIBRARIES", ("no_such_library",))
    words = ("no_such_library", "lrmerge[plot]")
    refused("report", results / "plain", code=2, words=words)
    base, tuned = results / "in" / "base", results / "in" / "math"
    refused("extract", base, tuned, "-o", tmp_path / "out", "--report", code=2, words=words, out=tmp_path / "out")
    with pytest.raises(LrmergeError, match="no_such_library"):
        lr.write_report(results / "plain")
