"""What a push sent, or would send."""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class PushedFile:
    """One file of the repository. state: new, changed, same or removed, beside what it held before."""

    name: str
    nbytes: int
    state: str


@dataclass(frozen=True)
class PushReport:
    """The result of ``push``.

    folder: what was pushed. kind: model or adapter. url: where it is now. private: whether others cannot see it, None
    where the owner's default decides. created: whether the repository is new. left: name of what stayed here, and why.
    commit: None where nothing had changed, or in a dry run. pull_request, collection: their addresses, where asked
    for. load: code that loads it.
    """

    folder: str
    kind: str
    repo: str
    url: str
    revision: str
    private: bool | None
    created: bool
    files: tuple[PushedFile, ...]
    left: dict[str, str]
    notes: tuple[str, ...]
    commit: str | None
    pull_request: str | None
    collection: str | None
    dry_run: bool
    seconds: float
    load: str

    @property
    def nbytes(self) -> int:
        """Bytes of what is new or changed; what the Hub has already of them is not sent again."""
        return sum(file.nbytes for file in self.files if file.state in ("new", "changed"))

    @property
    def states(self) -> dict[str, int]:
        """How many files are new, changed, the same, removed."""
        return dict(Counter(file.state for file in self.files))

    def to_json(self) -> dict[str, Any]:
        """Everything, ready for JSON."""
        return {"totals": {"bytes": self.nbytes, "states": self.states}, **asdict(self)}
