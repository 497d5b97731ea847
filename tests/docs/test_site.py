"""The site builds without a warning, and needs no network to be read."""

from __future__ import annotations

from html.parser import HTMLParser
from pathlib import Path

import pytest
import sphinx.cmd.build
from world import ROOT

import mergekit_lr
from mergekit_lr.methods.registry import methods

LOADS = {"script": "src", "img": "src", "link": "href", "iframe": "src", "source": "src", "object": "data"}


class Page(HTMLParser):
    """What a page loads, how many formulas it has, and the text of its headings."""

    def __init__(self, path: Path):
        super().__init__()
        self.loaded: list[str] = []
        self.formulas = 0
        self.feed(path.read_text(encoding="utf-8"))

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.formulas += tag == "math"
        self.loaded += [value or "" for key, value in attrs if LOADS.get(tag) == key]


@pytest.fixture(scope="module")
def site(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("site")
    code = sphinx.cmd.build.main(["--quiet", "--fail-on-warning", "--keep-going", str(ROOT / "docs"), str(out)])
    assert code == 0
    return out


def test_nothing_is_loaded_from_elsewhere(site: Path):
    pages = list(site.rglob("*.html"))
    assert len(pages) > 60
    loaded = {source for path in pages for source in Page(path).loaded}
    assert loaded, "no page loads anything, not even its style"
    assert [source for source in loaded if source.startswith(("http:", "https:", "//"))] == []
    styles = [path.read_text(encoding="utf-8") for path in site.rglob("*.css")]
    assert not any(word in style for style in styles for word in ("@import", "url(http", "url(//", 'url("http'))


def test_every_method_has_its_page_with_its_formulas(site: Path):
    for name in methods():
        assert Page(site / "methods" / f"{name}.html").formulas > 0, name


def test_every_public_name_is_in_the_reference(site: Path):
    text = (site / "api.html").read_text(encoding="utf-8")
    missing = [name for name in mergekit_lr.__all__ if f'id="mergekit_lr.{name}"' not in text]
    assert missing == []
