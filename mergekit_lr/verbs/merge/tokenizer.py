"""The tokenizer of a merged model: an input's as it is, or the union of all of them, built with transformers.

A union is the base's tokenizer with what the others have besides put behind it, in their order: first their plain
tokens, then their added ones with their settings. No token of the base changes its number.
"""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lr.checkpoint.checkpoint import read_config
from mergekit_lr.checkpoint.hub import find
from mergekit_lr.errors import FormatError, MismatchError, UsageError
from mergekit_lr.recipe.reading import Recipe
from mergekit_lr.verbs.apply.result import TOKENIZER
from mergekit_lr.verbs.merge.sources import Source

FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "vocab.txt", "spiece.model")  # any of them is a tokenizer
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")


class Words(NamedTuple):
    """A tokenizer: its tokens with their numbers, and the object of transformers."""

    ids: dict[str, int]
    tokenizer: Any


@dataclass(frozen=True, eq=False)
class Chosen:
    """The tokenizer of the result.

    name: union, base, or the model that it comes from. folder: where its files lie, or those that it started from.
    ids: token to number. made: the tokenizer where it is new; None where its files are copied. special: numbers of
    its bos, eos and pad tokens. keeper: the model whose number of rows the tables keep. plain: tokens of a union that
    were no added ones in their model.
    """

    name: str
    folder: Path
    ids: dict[str, int]
    made: Any | None
    special: dict[str, int]
    keeper: str
    plain: int = 0

    def save(self, out: Path) -> None:
        """Put its files into ``out``, in place of any other tokenizer's."""
        for path in [path for pattern in TOKENIZER for path in out.glob(pattern)]:
            path.unlink()
        if self.made is not None:
            self.made.save_pretrained(out)
            return
        for path in (path for pattern in TOKENIZER for path in self.folder.glob(pattern)):
            shutil.copyfile(path, out / path.name)


def tokenizer_folder(source: Source) -> Path | None:
    """The folder of a model's tokenizer: its own, or its LoRA's where that resizes the vocabulary; None without one."""
    folders = [source.checkpoint.folder]
    if source.applied is not None and source.applied.resized:
        folders = [*(file.parent for file in source.files), *folders]
    return next((folder for folder in folders if folder and any((folder / name).exists() for name in FILES)), None)


def digest(folder: Path) -> str:
    """SHA-256 of all files of the tokenizer in ``folder``."""
    total = hashlib.sha256()
    for path in sorted({path for pattern in TOKENIZER for path in folder.glob(pattern)}):
        total.update(path.name.encode() + b"\0" + path.read_bytes())
    return total.hexdigest()


def read_words(folder: Path) -> Words:
    """The tokenizer in ``folder``, by transformers; code in the folder is never run.

    Raises:
        UsageError: transformers is not installed. FormatError: transformers cannot read it.
    """
    try:
        from transformers import AutoTokenizer
    except ImportError:
        raise UsageError(
            "vocabularies are read by transformers, which is not installed: pip install 'lrmerge[peft]', or leave "
            "tokenizer and tokenizer_source out of the recipe"
        ) from None
    try:
        found = AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False, local_files_only=True)
    except Exception as error:  # the tokenizers library raises bare Exceptions for a damaged file
        reason = (str(error).strip().splitlines() or [""])[0][:120]
        raise FormatError(f"{folder}: transformers cannot read its tokenizer.json ({reason})") from None
    return Words(dict(sorted(found.get_vocab().items(), key=lambda item: item[1])), found)


def wanted(recipe: Recipe) -> str | None:
    """What the recipe says of the tokenizer: union, base or a model; None where it says nothing."""
    doc = recipe.document
    source = doc.tokenizer.source if doc.tokenizer is not None else doc.tokenizer_source
    return source.removeprefix("model:") if source else None


def choose_tokenizer(
    recipe: Recipe, sources: Mapping[str, Source], template: Source, words: Mapping[str, Words], tokens: list[str]
) -> Chosen:
    """The tokenizer that the recipe asks for, with ``tokens`` added where it lacks them.

    Args:
        words: the tokenizer of each model that has one, the template's among them.

    Raises:
        UsageError: the recipe names neither union, base nor a place. FormatError, HubError: nothing is there.
        MismatchError: that has no tokenizer.
    """
    name = wanted(recipe) or "base"
    keeper = name if name in sources else template.ref
    folder = tokenizer_folder(sources[keeper])
    if name not in ("union", "base") and name not in sources:
        if "/" not in name and not Path(name).is_dir():
            key = ("tokenizer", "source") if recipe.document.tokenizer is not None else ("tokenizer_source",)
            raise recipe.place.error(
                key, f"{name!r} is no model of the recipe; choose union, base, a model, a folder or org/name on the Hub"
            )
        folder = find(name).path
    if folder is None or not any((folder / file).exists() for file in FILES):
        raise MismatchError(f"{name if folder else keeper}: has no tokenizer.json to take the vocabulary from")
    grows = name == "union" or tokens
    own = words[keeper] if keeper in words and name in ("base", keeper) and not grows else read_words(folder)
    plain, changed = 0, False
    if name == "union":
        plain, changed = _unite(own, {ref: held for ref, held in words.items() if ref != template.ref}, sources)
    new = [token for token in tokens if token not in own.tokenizer.get_vocab()]
    own.tokenizer.add_tokens(new)
    return Chosen(
        name=name,
        folder=folder,
        ids=dict(sorted(own.tokenizer.get_vocab().items(), key=lambda item: item[1])),
        made=own.tokenizer if changed or new else None,
        special={key: found for key in SPECIAL if isinstance(found := getattr(own.tokenizer, key, None), int)},
        keeper=keeper,
        plain=plain,
    )


def _unite(own: Words, others: Mapping[str, Words], sources: Mapping[str, Source]) -> tuple[int, bool]:
    """Add to ``own`` what others have and their tables hold; how many plain tokens that were, and if any was added."""
    plain: dict[str, None] = {}
    added: dict[str, Any] = {}
    for ref, other in others.items():
        rows = sources[ref].token_rows
        infos = other.tokenizer.added_tokens_decoder
        special = {info.content for info in infos.values()}
        plain |= {token: None for token, i in other.ids.items() if i < rows and token not in special}
        for i, info in sorted(infos.items()):
            if i < rows:
                added.setdefault(info.content, info)
    mine = {info.content for info in own.tokenizer.added_tokens_decoder.values()}
    plain_new = [token for token in plain if token not in own.ids and token not in added]
    added_new = [info for token, info in added.items() if token not in mine]
    own.tokenizer.add_tokens(plain_new)
    own.tokenizer.add_tokens(added_new)
    return len(plain_new), bool(plain_new or added_new)


def note_on_tokens(sources: Mapping[str, Source], template: Source) -> list[str]:
    """Of a recipe that asks for no tokenizer: models whose tokens have other numbers than the template's, as a note."""
    mine = template.checkpoint.folder
    others = [
        source.ref
        for source in sources.values()
        if mine and source.checkpoint.folder and not same_tokens(mine, source.checkpoint.folder)
    ]
    if not others:
        return []
    return [
        f"{', '.join(others)} and {template.ref} have different vocabularies; rows are merged by their number, with "
        "tokenizer_source: union, or base, by their token"
    ]


def same_tokens(mine: Path, theirs: Path) -> bool:
    """Whether two ``tokenizer.json`` give the same tokens the same numbers; True where a folder has no such file."""
    files = [folder / "tokenizer.json" for folder in (mine, theirs)]
    if not all(file.exists() for file in files) or files[0].read_bytes() == files[1].read_bytes():
        return True

    def tokens(file: Path) -> tuple[Any, Any]:
        content = read_config(file)
        return (content.get("model") or {}).get("vocab"), content.get("added_tokens")

    return tokens(files[0]) == tokens(files[1])
