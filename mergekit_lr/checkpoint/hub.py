"""From what a user writes to a path on this disk: a local path, or a model of the Hugging Face Hub.

huggingface_hub does the work, so its cache, its token, its offline mode and its endpoint hold here. When the Hub cannot
be asked, what its cache holds of the revision is taken, as transformers does; when it refuses, that is an error.

Weights are fetched late: ``find`` brings a model's small files, and the headers of its safetensors can be read where
they are. So a plan costs kilobytes, and a mistake in a recipe is told before a download, not after it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import NamedTuple, TypeVar

from mergekit_lr.checkpoint.safetensors import TensorInfo, header_length, parse_header
from mergekit_lr.errors import FormatError, HubError

T = TypeVar("T")

HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# What a checkpoint or an adapter needs beside its weights; all of it lies at the top level.
TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
# The same weights once more, in a layout of the maker's own; a trainer's state; whatever lies in folders.
IGNORED = ("consolidated*", "training_args.bin", "optimizer*", "*/*")
_RETRIES = 3  # of a request for a header, after 1, 2 and 4 seconds
_FIRST = 100_000  # bytes asked for at first: most headers are shorter


@dataclass(frozen=True)
class Remote:
    """A model of the Hub whose weights are not here yet, or not all of them.

    repo, commit: which. folder: its small files, in the Hub's cache; what is fetched lies there too. weights: names of
    its safetensors.
    """

    repo: str
    commit: str
    folder: Path
    weights: frozenset[str]
    _fetched: set[str] = field(default_factory=set, repr=False, compare=False)
    _lock: Lock = field(default_factory=Lock, repr=False, compare=False)

    def header(self, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        """What ``read_header`` gives of the file once it is fetched.

        Raises:
            FormatError: the header is damaged. HubError: the Hub refuses it or cannot be reached.
        """
        return _asked(self.repo, self.commit, lambda: self._header(file))

    def fetch(self, files: Iterable[str]) -> None:
        """Download these files, unless they are here.

        Raises:
            HubError: the Hub refuses them or cannot be reached.
        """
        from huggingface_hub import snapshot_download

        with self._lock:
            missing = sorted(set(files) - self._fetched)
            if missing:
                _asked(
                    self.repo,
                    self.commit,
                    lambda: snapshot_download(self.repo, revision=self.commit, allow_patterns=missing),
                )
                self._fetched.update(missing)

    def _header(self, file: str) -> tuple[dict[str, TensorInfo], dict[str, str]]:
        from huggingface_hub import constants, hf_hub_url
        from huggingface_hub.utils import build_hf_headers, hf_raise_for_status, http_backoff

        url, path = hf_hub_url(self.repo, file, revision=self.commit), self.folder / file

        def part(start: int, stop: int) -> tuple[bytes, int]:
            """Bytes [start, stop), and how many the file has."""
            headers = build_hf_headers() | {"Range": f"bytes={start}-{stop - 1}"}
            timeout = constants.HF_HUB_DOWNLOAD_TIMEOUT
            answer = http_backoff("GET", url, headers=headers, timeout=timeout, max_retries=_RETRIES)
            hf_raise_for_status(answer)
            size = answer.headers.get("Content-Range", "").rpartition("/")[2]
            return answer.content, int(size) if size.isdigit() else len(answer.content)

        first, size = part(0, _FIRST)
        length = header_length(path, first[:8], size)
        raw = first[8 : 8 + length]
        return parse_header(path, raw if len(raw) == length else part(8, 8 + length)[0], size)


class Found(NamedTuple):
    """path: a file or a folder. remote: what the folder lacks, None where it is whole."""

    path: Path
    remote: Remote | None = None


def split_ref(ref: str) -> tuple[str, str | None]:
    """A Hub id without its revision, and the revision; a path, or an id without one, as it is."""
    match = HUB_ID.fullmatch(ref)
    if match is None or match["revision"] is None or Path(ref).expanduser().exists():
        return ref, None
    return match["id"], match["revision"]


def local_path(ref: str) -> Path:
    """The local file or folder that ``ref`` means; a Hub id is downloaded (or found in the cache) first.

    Raises:
        FormatError: ``ref`` is a path to nothing.
        HubError: the Hub has no such model or revision, refuses it, or cannot be reached.
    """
    path, remote = find(ref)
    if remote is not None:
        remote.fetch(remote.weights)
    return path


def find(ref: str) -> Found:
    """The same, with a model's weights still on the Hub where they are safetensors and not in the cache.

    An adapter is small, and pickled weights have no header: those are downloaded.

    Raises:
        FormatError, HubError: as ``local_path``.
    """
    path = Path(ref).expanduser()
    try:
        if path.exists():
            return Found(path)
    except OSError as error:
        raise FormatError(f"{ref}: cannot be read ({error.strerror})") from None
    match = HUB_ID.fullmatch(ref)
    if match is None or ref.startswith((".", "~")) or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise FormatError(f"{ref}: no such file or folder")
    repo, revision = match["id"], match["revision"]
    return _asked(repo, revision, lambda: _found(repo, revision), otherwise=lambda: Found(_cached(repo, revision)))


def _asked(repo: str, revision: str | None, ask: Callable[[], T], otherwise: Callable[[], T] | None = None) -> T:
    """What the Hub answers; where it cannot be asked what ``otherwise`` finds in its cache.

    Raises:
        HubError: one line, why there is no answer.
    """
    from huggingface_hub import constants, errors

    name = f"{repo}@{revision}" if revision else repo

    def cached(problem: str) -> T:
        if otherwise is not None:
            try:
                return otherwise()
            except errors.LocalEntryNotFoundError:
                pass
        raise HubError(f"{name}: {problem}") from None

    if constants.HF_HUB_OFFLINE:
        return cached("no such folder here, not in the Hub's cache, and the Hub cannot be asked (HF_HUB_OFFLINE)")
    try:
        return ask()
    except errors.GatedRepoError:
        raise HubError(
            f"{name}: this model is gated; accept its terms on its page, then log in with `hf auth login`"
        ) from None
    except errors.RevisionNotFoundError:
        raise HubError(f"{name}: the model exists, the revision {revision} does not") from None
    except (errors.RepositoryNotFoundError, errors.HFValidationError):
        raise HubError(
            f"{name}: no such folder here and no such model on the Hub; check the spelling, or log in with "
            "`hf auth login` if it is private"
        ) from None
    except UnicodeEncodeError:
        raise HubError(
            f"{name}: the token in use has characters that no token has; log in with `hf auth login`"
        ) from None
    except (errors.HTTPError, OSError) as error:  # pyright: ignore[reportPrivateImportUsage]
        # A refusal (4xx) stands; an outage does not matter where the model was downloaded before.
        if 400 <= getattr(getattr(error, "response", None), "status_code", 0) < 500:
            raise HubError(f"{name}: the Hub refuses it ({_reason(error)})") from None
        return cached(f"not in the cache, and the Hub cannot be reached ({_reason(error)})")


def _found(repo: str, revision: str | None) -> Found:
    from huggingface_hub import HfApi, snapshot_download

    def download(*weights: str) -> Path:
        patterns = [*TEXT_FILES, *weights]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=patterns, ignore_patterns=[*IGNORED]))

    files = {entry.rfilename for entry in HfApi().model_info(repo, revision=revision).siblings or []}
    weights = frozenset(file for file in files if _is_weight(file, ".safetensors"))
    # Never pickles where safetensors are there.
    if not weights:
        return Found(download("*.bin"))
    if "config.json" not in files:
        return Found(download("*.safetensors"))
    folder = download()
    whole = all((folder / file).exists() for file in weights)
    return Found(folder, None if whole else Remote(repo, folder.name, folder, weights))


def _cached(repo: str, revision: str | None) -> Path:
    """The snapshot in the cache, complete in one of the formats.

    Raises:
        LocalEntryNotFoundError: there is none.
    """
    from huggingface_hub import errors, snapshot_download

    missing = errors.LocalEntryNotFoundError(f"{repo} is not in the cache")
    for suffix in (".safetensors", ".bin"):
        allowed = [*TEXT_FILES, f"*{suffix}"]
        try:
            folder = Path(
                snapshot_download(
                    repo, revision=revision, allow_patterns=allowed, ignore_patterns=[*IGNORED], local_files_only=True
                )
            )
        except errors.LocalEntryNotFoundError as error:
            missing = error
            continue
        if any(_is_weight(path.name, suffix) for path in folder.iterdir()):
            return folder
    raise missing


def _is_weight(file: str, suffix: str) -> bool:
    return file.endswith(suffix) and "/" not in file and not file.startswith(("consolidated", "optimizer"))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [repr(error)])[0][:160]
