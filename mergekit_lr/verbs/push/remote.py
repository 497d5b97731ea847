"""What a repository of the Hub holds, and what a push would change there."""

from __future__ import annotations

import hashlib
import tempfile
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lr.report.manifest import FILE
from mergekit_lr.verbs.push.contents import Part
from mergekit_lr.verbs.push.refusals import told

if TYPE_CHECKING:
    from huggingface_hub import HfApi
    from huggingface_hub.hf_api import RepoFile

# What a loader would take beside, or in place of, the weights that are pushed.
STALE = (".safetensors", ".bin", ".index.json")
CONFIGS = ("config.json", "adapter_config.json")
# What a repository may hold and be empty still, or what the user writes beside a result.
HARMLESS = (".gitattributes", ".gitignore", "README.md")
BLOCK = 1 << 22  # bytes


@dataclass(frozen=True)
class Remote:
    """A repository before the push.

    exists: whether it is there. private: what it is then. head: the commit that the push goes onto. branch: whether
    the revision that was asked for is there. files: by path. card: its README.md.
    """

    repo: str
    exists: bool
    private: bool | None = None
    head: str | None = None
    branch: bool = True
    files: dict[str, RepoFile] = field(default_factory=dict)
    card: str | None = None

    @property
    def is_ours(self) -> bool:
        """Whether lrmerge wrote what it holds."""
        return any(name == FILE or name.endswith(f".{FILE}") for name in self.files)

    def state_of(self, part: Part) -> str:
        """``new``, ``changed`` or ``same``, by size first and then by the digest that the Hub has of the file."""
        there = self.files.get(part.name)
        if there is None:
            return "new"
        if there.size != part.nbytes:
            return "changed"
        local = _sha256(part) if there.lfs else _git_sha1(part)
        return "same" if local == (there.lfs.sha256 if there.lfs else there.blob_id) else "changed"

    def stale(self, parts: Iterable[Part]) -> list[str]:
        """Weights and configurations that the result does not have, and that a loader would mix with it."""
        kept = {part.name for part in parts}
        top = (name for name in self.files if "/" not in name and name not in kept)
        return [name for name in top if name.endswith(STALE) or name in CONFIGS]


def look(api: HfApi, repo: str, revision: str | None) -> Remote:
    """The repository ``repo`` as it is; where it is not, one that does not exist.

    Raises:
        HubError: the Hub refuses the token, or cannot be reached.
    """
    from huggingface_hub import errors

    with told(repo, "looking at it"):
        try:
            found, branch = api.model_info(repo, revision=revision), True
        except errors.RevisionNotFoundError:
            found, branch = api.model_info(repo), False
        except errors.RepositoryNotFoundError:
            return Remote(repo, exists=False)
        tree = list(api.list_repo_tree(repo, recursive=True, revision=found.sha))
        files = {entry.path: entry for entry in tree if hasattr(entry, "blob_id")}
        card = _card(api, repo, found.sha) if "README.md" in files else None
    return Remote(repo, True, found.private, found.sha, branch, files, card)  # type: ignore[arg-type]


def notes_on_bases(api: HfApi, bases: Iterable[str], *, kind: str, private: bool) -> tuple[list[str], list[str]]:
    """What a reader must know of the bases (for the card), and what the one who pushes must know beside it.

    Raises:
        HubError: the Hub cannot be reached.
    """
    from huggingface_hub import errors

    told_readers, told_owner = [], []
    for base in bases:
        with told(base, "looking at the base"):
            try:
                info = api.model_info(base)
            except errors.GatedRepoError:
                told_readers.append(_gated(base))
                continue
            except errors.RepositoryNotFoundError:
                told_owner.append(f"{base}: the Hub has no such base, or it is private and the token may not see it")
                continue
        if info.gated:
            told_readers.append(_gated(base))
        if info.private:
            told_readers.append(f"The base `{base}` is private: only those who may see it can load this.")
            if not private:
                told_owner.append(f"{base}: the base is private, and this push makes its name public")
        if kind == "model" and (info.gated or info.private) and not private:
            told_owner.append(f"{base}: its terms hold for weights made from it as well; may they be public?")
    return told_readers, told_owner


def _gated(base: str) -> str:
    return f"The base `{base}` is gated: accept its terms on its page on the Hub before loading this."


def _card(api: HfApi, repo: str, revision: str | None) -> str:
    with tempfile.TemporaryDirectory(prefix="lrmerge-") as scratch:
        path = api.hf_hub_download(repo, "README.md", revision=revision, local_dir=scratch)
        return Path(path).read_bytes().decode(errors="replace")


def _sha256(part: Part) -> str:
    if part.text is not None:
        return hashlib.sha256(part.text.encode()).hexdigest()
    digest = hashlib.sha256()
    with part.path.open("rb") as file:
        while block := file.read(BLOCK):
            digest.update(block)
    return digest.hexdigest()


def _git_sha1(part: Part) -> str:
    """git's name of a file: SHA-1 over its length and its content."""
    data = part.path.read_bytes() if part.text is None else part.text.encode()
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
