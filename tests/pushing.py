"""What the tests of push share: results to push, the command line, and how a refusal looks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import tiny
from hub_server import Hub, Repository

BASE = "org/base"
REPO = "me/result"


def results(folder: Path) -> Path:
    """An extracted adapter (``adapter``) and a merged model of three shards (``model``), both from folders here."""
    base = tiny.decoder()
    tiny.save(folder / "base", base, shards=3)
    tiny.save(folder / "tuned", tiny.finetuned(base, rank=2))
    made = [
        tiny.lrmerge("extract", folder / "base", folder / "tuned", "-o", folder / "adapter", "--rank", 2, "-q"),
        tiny.lrmerge("apply", folder / "base", folder / "adapter", "-o", folder / "model", "-q"),
    ]
    assert [one.code for one in made] == [0, 0], made
    return folder


def copied(source: Path, place: Path) -> Path:
    """A copy that a test may change."""
    return Path(shutil.copytree(source, place))


def with_base(served: Hub, *, access: str = "public") -> None:
    """The base on the Hub, under ``BASE``."""
    served.repositories[BASE] = Repository({"main": {"config.json": json.dumps(tiny.CONFIG).encode()}}, access=access)


def push(folder: Path, *options: object, repo: str = REPO, base: str | None = BASE) -> tiny.Outcome:
    """``lrmerge push``, with the base's name on the Hub."""
    named = ("--base-model", base) if base else ()
    return tiny.lrmerge("push", folder, repo, *named, *options)


def refused(ended: tiny.Outcome, *words: str, code: int = 1) -> str:
    """The line that a push failed with; it holds all ``words``."""
    lines = [line for line in ended.err.splitlines() if not line.startswith(("note: ", "push: "))]
    assert ended.code == code, ended
    assert len(lines) == 1, ended
    assert ended.out == "", ended
    assert [word for word in words if word not in lines[0]] == [], lines[0]
    return lines[0]


def files(served: Hub, repo: str = REPO, revision: str = "main") -> dict[str, bytes]:
    """What a repository holds, without what the Hub itself puts there."""
    held = served.repositories[repo].files[revision]
    return {name: data for name, data in held.items() if name != ".gitattributes"}
