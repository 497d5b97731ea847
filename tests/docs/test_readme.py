"""The README's commands run as they stand; words in capitals are folders here."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from blocks import blocks, commands, perform, run
from world import ROOT, enter

STANDS_FOR = {
    "BASE": "examples/demo/base",
    "FINETUNED": "examples/demo/finetuned",
    "ADAPTER": "org/math-lora",
    "A": "org/math-lora",
    "B": "org/code-lora",
}
README = (ROOT / "README.md").read_text(encoding="utf-8")
LOOSE = [
    command
    for block in blocks(README)
    if block.language in ("", "sh")
    for command in commands(block.text)
    if "--install-completion" not in command
]


@pytest.mark.parametrize("command", LOOSE)
def test_command(command: str, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    folder = enter(world, tmp_path / "here")
    for word, path in STANDS_FOR.items():
        (folder / word).symlink_to(path)
    monkeypatch.chdir(folder)
    run(command)


def test_blocks_that_follow_each_other(world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.chdir(enter(world, tmp_path / "here"))
    names: dict[str, object] = {}
    for block in blocks(README):
        if block.language not in ("", "sh"):
            perform(block, names)


def test_links_lead_somewhere():
    pages = [ROOT / "README.md", *(ROOT / "docs").glob("*.md"), *(ROOT / "examples").rglob("*.md")]
    for page in pages:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text(encoding="utf-8")):
            if not target.startswith(("http", "methods/", "json/")):
                assert (page.parent / target).exists(), f"{page.name} links {target}"
