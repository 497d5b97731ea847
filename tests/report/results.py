"""Results of every verb on tiny models that lie as they would in the Hub's cache, and their cards."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

import tiny
from markdown_it import MarkdownIt

import mergekit_lr as lr

REVISION = "0123456789abcdef0123456789abcdef01234567"
ADAPTERS = ("extract", "full", "ranks", "other", "compress", "convert", "adapters")
MODELS = ("apply", "merge", "baked")
CARDS = {
    "tiny/base": "license: llama3.1\nlanguage: [en, no]\ndatasets:\n- org/pile\nextra_gated_prompt: accept\n",
    "tiny/math": "license: apache-2.0\nlanguage: de\npipeline_tag: text-generation\ndatasets: org/sums\n",
    "tiny/code": "license: mit\ntags:\n- code\n",
}


class World(NamedTuple):
    """hub: a cache. results: folders of results by name. here: a folder to work in, where ``tiny/base`` and the names
    of the results are folders, so that what a card says can be run without the Hub."""

    hub: Path
    results: Mapping[str, Path]
    here: Path

    def snapshot(self, repo: str) -> Path:
        """Where the cache holds a model."""
        return self.hub / f"models--{repo.replace('/', '--')}" / "snapshots" / REVISION

    def card(self, name: str) -> str:
        """The card of a result."""
        return (self.results[name] / "README.md").read_text()


def cached(hub: Path, repo: str, tensors: tiny.Tensors, card: str) -> Path:
    """A model as the Hub's cache holds it."""
    folder = hub / f"models--{repo.replace('/', '--')}" / "snapshots" / REVISION
    tiny.save(folder, tensors)
    (folder / "README.md").write_text(f"---\n{card}---\n# {repo}\n")
    return folder


@contextlib.contextmanager
def working_in(folder: Path) -> Iterator[None]:
    """Work in ``folder``."""
    before = Path.cwd()
    os.chdir(folder)
    try:
        yield
    finally:
        os.chdir(before)


def blocks(card: str, language: str, heading: str = "") -> list[str]:
    """The blocks of code in ``language`` under the headings that end in ``heading``."""
    found, under = [], ""
    for token in (tokens := MarkdownIt("commonmark").parse(card)):
        if token.type == "heading_open":
            under = tokens[tokens.index(token) + 1].content
        if token.type == "fence" and token.info == language and under.endswith(heading):
            found.append(token.content)
    return found


def make(root: Path) -> World:
    """All of it, below ``root``."""
    base = tiny.decoder()
    tuned = {"tiny/base": base, "tiny/math": tiny.finetuned(base, seed=1), "tiny/code": tiny.finetuned(base, seed=2)}
    held = {repo: cached(root / "hub", repo, tensors, CARDS[repo]) for repo, tensors in tuned.items()}
    out = {
        name: root / name
        for name in ("extract", "full", "ranks", "other", "compress", "convert", "apply", "merge", "adapters", "baked")
    }
    ends = (held["tiny/base"], held["tiny/math"])
    lr.extract(*ends, out["extract"], rank=4, embeddings="skip", exclude=["layers.0.mlp"])
    lr.extract(*ends, out["full"], rank=3, embeddings="full")
    lr.extract(*ends, out["ranks"], energy=0.5, embeddings="skip", rank_pattern={"q_proj": 2})
    lr.extract(held["tiny/base"], held["tiny/code"], out["other"], rank=3, embeddings="skip")
    lr.compress(out["extract"], out["compress"], rank=2, base=held["tiny/base"])
    lr.convert(out["other"], out["convert"], to="peft", dtype="float16")
    lr.apply(held["tiny/base"], [(out["extract"], 0.5), out["other"]], out["apply"], dtype="bfloat16")
    halves = {"weight": 0.5, "density": 0.7}
    models = [{"model": str(held[repo]), "parameters": halves} for repo in ("tiny/math", "tiny/code")]
    lr.merge(
        {"merge_method": "dare_ties", "base_model": str(held["tiny/base"]), "models": models}, out["merge"], seed=3
    )
    adapters = [{"adapter": str(out[name])} for name in ("extract", "other")]
    recipe = {"merge_method": "ties", "space": "core", "base_model": str(held["tiny/base"]), "adapters": adapters}
    lr.merge(recipe | {"output": {"rank": 5}}, out["adapters"])
    lr.merge(recipe | {"output": {"kind": "model"}}, out["baked"])
    here = root / "here"
    for repo, folder in held.items():
        (here / repo).parent.mkdir(parents=True, exist_ok=True)
        (here / repo).symlink_to(folder)
    for name, folder in out.items():
        (here / name).symlink_to(folder)
    return World(root / "hub", out, here)
