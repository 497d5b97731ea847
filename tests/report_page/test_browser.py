"""The page in headless Chromium: it draws without a word of complaint, asks for nothing, and obeys the keyboard."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from test_page import HOSTILE, shaped, written

import mergekit_lr as lr

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium is here: apt-get install chromium")

DRAWN = "[...document.querySelectorAll('.chart')].every(chart => 'drawn' in chart.dataset)"
MARKS = """Object.fromEntries([...document.querySelectorAll('.chart')].map(chart =>
  [chart.id, chart.querySelectorAll('.mark-line.role-mark path, .mark-rect.role-mark path').length]))"""
LINES = "document.querySelectorAll('#energy-chart .mark-line.role-mark path').length"


@pytest.fixture(scope="module")
def chromium() -> Iterator:
    """A running browser."""
    from playwright.sync_api import sync_playwright

    sandbox = ["--no-sandbox"] if os.geteuid() == 0 else []  # Chromium has none for root
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=sandbox)
        yield browser
        browser.close()


@pytest.fixture
def shown(chromium) -> Iterator[Callable]:
    """Opens a page and waits for its figures; at the end nothing may have been said, asked for or popped up."""
    complaints: list[str] = []
    contexts = []

    def show(path: str | Path, *, width: int = 1440, theme: str = "light", script: bool = True):
        context = chromium.new_context(
            viewport={"width": width, "height": 900}, color_scheme=theme, java_script_enabled=script
        )
        contexts.append(context)
        page = context.new_page()
        page.on("console", lambda message: complaints.append(message.text))
        page.on("pageerror", lambda error: complaints.append(str(error)))
        page.on("dialog", lambda dialog: (complaints.append(dialog.message), dialog.dismiss()))
        page.on("request", lambda request: complaints.append(request.url) if request.url != address else None)
        address = Path(path).resolve().as_uri()
        page.goto(address)
        if script:
            page.wait_for_function(DRAWN)
        return page

    yield show
    for context in contexts:
        context.close()
    assert [text for text in complaints if text != "data:,"] == []


@pytest.fixture(scope="session")
def extraction(tmp_path_factory) -> str:
    """A page of ten kinds, so that hues come again, over four layers; one name means harm."""
    kinds = {f"block.{name}": (16, 12) for name in "abcdefghij"}
    content = shaped(4, kinds, 8, first=HOSTILE)
    return lr.write_report(written(tmp_path_factory.mktemp("browser") / "out", content)).path


@pytest.fixture(scope="session")
def merge(results, tmp_path_factory) -> str:
    return lr.write_report(results / "models", tmp_path_factory.mktemp("browser") / "merge.html").path


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("width", [1440, 390])
def test_every_figure_is_drawn_with_all_its_marks(shown, extraction, merge, width, theme):
    for path in (extraction, merge):
        page = shown(path, width=width, theme=theme)
        said = page.evaluate(
            "Object.fromEntries([...document.querySelectorAll('.chart')].map(c => [c.id, +c.dataset.marks]))"
        )
        assert page.evaluate(MARKS) == said  # fmt: skip
        assert page.evaluate("document.documentElement.scrollWidth") == width


def test_choices_change_the_lines(shown, extraction):
    page = shown(extraction)
    first = page.evaluate(LINES)
    assert first == 11  # the name that means harm is a kind of its own
    counts = {}
    for kind, layer in (("b", "all"), ("all", "2"), ("b", "2"), ("all", "all")):
        page.select_option("#energy-kind", kind)
        page.select_option("#energy-layer", layer)
        page.wait_for_timeout(100)
        counts[kind, layer] = page.evaluate(LINES)
    assert counts == {("b", "all"): 4, ("all", "2"): 10, ("b", "2"): 1, ("all", "all"): 11}


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_button_turns_the_page_and_its_figures(shown, merge, theme):
    page = shown(merge, theme=theme)
    look = """[getComputedStyle(document.body).backgroundColor,
      getComputedStyle(document.querySelector('.mark-rect.role-mark path')).fill,
      document.getElementById('theme').getAttribute('aria-pressed')]"""
    before = page.evaluate(look)
    page.keyboard.press("Tab")
    page.keyboard.press("Tab")
    page.keyboard.press("Enter")
    after = page.evaluate(look)
    assert all(one != other for one, other in zip(before, after, strict=True))
    assert before[2] == ("true" if theme == "dark" else "false")
    other = shown(merge, theme="dark" if theme == "light" else "light")
    assert other.evaluate(look) == after
    page.keyboard.press("Enter")
    assert page.evaluate(look) == before


def test_keyboard_reaches_everything_and_shows_where_it_is(shown, extraction):
    page = shown(extraction)
    page.evaluate("document.querySelectorAll('details').forEach(details => { details.open = true; })")
    wanted = page.evaluate("document.querySelectorAll('a, button, select, summary, .scroll, pre').length")
    reached = set()
    for _ in range(wanted):
        page.keyboard.press("Tab")
        found = page.evaluate("""(() => { const e = document.activeElement, s = getComputedStyle(e);
          const all = [...document.querySelectorAll('*')];
          return [all.indexOf(e), e.tagName, s.outlineStyle, s.outlineWidth]; })()""")
        assert found[2:] == ["solid", "2px"], found
        reached.add(found[0])
    assert len(reached) == wanted


def test_paper_is_light_and_has_the_figures(shown, extraction):
    page = shown(extraction, theme="dark")
    page.emulate_media(media="print", color_scheme="dark")
    assert page.evaluate("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    visible = "[...document.querySelectorAll('%s')].map(e => e.checkVisibility())"
    assert set(page.evaluate(visible % "nav, button, select, details")) == {False}
    assert set(page.evaluate(visible % ".chart svg, .legend")) == {True}


def test_tables_are_there_without_scripts(shown, extraction):
    page = shown(extraction, script=False)
    assert page.locator("noscript").count() == 1
    assert not page.locator("#energy-kind, #theme").first.is_visible()
    page.locator("summary").first.click()
    assert page.locator("details table").first.is_visible()


def test_names_in_tooltips_are_text(shown, tmp_path):
    content = shaped(1, {"up": (8, 8)}, 4, first=HOSTILE)
    page = shown(lr.write_report(written(tmp_path / "out", content)).path)
    page.locator("#error-map .mark-rect.role-mark path").first.hover()
    page.wait_for_selector("#vg-tooltip-element.visible")
    assert "<img" in page.locator("#vg-tooltip-element").inner_text()
    assert page.evaluate("document.images.length") == 0


def test_large_model_is_drawn_whole(shown, tmp_path):
    kinds = {f"self_attn.{p}_proj": (8192, 8192) for p in "qkvo"}
    kinds |= {f"mlp.{p}_proj": (28672, 8192) for p in ("gate", "up", "down")}
    report = lr.write_report(written(tmp_path / "out", shaped(80, kinds, 64)))
    page = shown(report.path)
    assert page.evaluate(MARKS) == report.figures
    page.select_option("#energy-kind", "down_proj")
    page.wait_for_function(f"{LINES} == 80")
    assert json.loads(page.evaluate("JSON.stringify(performance.getEntriesByType('resource'))")) == []
