"""What the small Hub of the tests holds: repositories, stored weights, collections, and what shall go wrong."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

TOKEN = "hf_onlyForThisTest"
LARGE = (".safetensors", ".bin", ".model")  # kept as LFS objects
ATTRIBUTES = b"*.safetensors filter=lfs diff=lfs merge=lfs -text\n"


@dataclass
class Repository:
    """files: by revision (branch, tag, pull request) the content of every path. access: public, private or gated."""

    files: dict[str, dict[str, bytes]]
    access: str = "public"

    def commit(self, revision: str) -> str | None:
        """The commit that a revision (or a commit itself) means; None where there is none."""
        commits = {name: _commit(name, files) for name, files in self.files.items()}
        return commits.get(revision) or next((c for c in commits.values() if c == revision), None)

    def at(self, commit: str) -> dict[str, bytes]:
        """Every file of a commit."""
        return next(files for name, files in self.files.items() if self.commit(name) == commit)


@dataclass
class Fault:
    """What goes wrong with the next ``times`` requests whose method is ``method`` and whose path holds ``path``.

    status: answered in place of doing it, with ``headers`` and ``message``. cut: the connection ends after so many
    bytes of the body that the client sends (or, of a GET, gets). silent: no answer for so many seconds. slow: so many
    seconds for each piece of the client's body.
    """

    method: str
    path: str
    status: int = 0
    message: str = ""
    headers: Mapping[str, str] = field(default_factory=dict)
    cut: int | None = None
    silent: float = 0
    slow: float = 0
    times: int = 1


@dataclass
class Hub:
    """The running server.

    requests: (method, path, Authorization header) of every request so far. sent: (path, bytes) of every part of a file
    that a client got. received: (path, bytes) of every body that
    was sent by PUT, whole or cut. objects: stored weights by SHA-256. chunk: bytes of a part of a multipart upload.
    token: of the owner of everything; others are of people who may see what is public. revoked: tokens of nobody.
    readonly: whether the owner's may only read. xet: folder of a Xet storage, where the client shall use one.
    down: answer nothing but 503.
    """

    endpoint: str
    repositories: dict[str, Repository]
    token: str = TOKEN
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    sent: list[tuple[str, int]] = field(default_factory=list)
    received: list[tuple[str, int]] = field(default_factory=list)
    objects: dict[str, bytes] = field(default_factory=dict)
    pieces: dict[tuple[str, int], bytes] = field(default_factory=dict)
    verified: set[str] = field(default_factory=set)
    collections: dict[str, list[str]] = field(default_factory=dict)
    commits: list[dict] = field(default_factory=list)
    faults: list[Fault] = field(default_factory=list)
    revoked: set[str] = field(default_factory=set)
    chunk: int = 4096
    readonly: bool = False
    xet: Path | None = None
    down: bool = False

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent to a client."""
        paths = (path for method, path, _ in self.requests if method == "GET")
        return {path.rpartition("/")[2] for path in paths if path.startswith("blob/")}

    def uploaded(self) -> int:
        """Bytes of weights that clients sent, those of broken connections too."""
        return sum(nbytes for _, nbytes in self.received)

    def fault(self, method: str, path: str) -> Fault | None:
        """The fault that meets this request, if one does."""
        for fault in self.faults:
            if fault.times > 0 and fault.method == method and fault.path in path:
                fault.times -= 1
                return fault
        return None


def digest(data: bytes) -> str:
    """The name of a stored object."""
    return hashlib.sha256(data).hexdigest()


def git_name(data: bytes) -> str:
    """git's name of a file."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


def is_large(path: str) -> bool:
    """Whether a file is kept as an LFS object."""
    return path.endswith(LARGE)


def _commit(name: str, files: Mapping[str, bytes]) -> str:
    content = "".join(f"{path} {digest(data)}\n" for path, data in sorted(files.items()))
    return hashlib.sha1(f"{name}\n{content}".encode()).hexdigest()
