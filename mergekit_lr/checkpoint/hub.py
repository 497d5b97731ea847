"""From what a user writes to a path on this disk: a local path, or a model of the Hugging Face Hub.

huggingface_hub does the work, so its cache, its token, its offline mode and its endpoint hold here. When the Hub cannot
be asked, what its cache holds of the revision is taken, as transformers does; when it refuses, that is an error.
"""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lr.errors import FormatError, HubError

HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# What a checkpoint or an adapter needs beside its weights; all of it lies at the top level.
TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")
# The same weights once more, in a layout of the maker's own; a trainer's state; whatever lies in folders.
IGNORED = ("consolidated*", "training_args.bin", "optimizer*", "*/*")


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
    path = Path(ref).expanduser()
    try:
        if path.exists():
            return path
    except OSError as error:
        raise FormatError(f"{ref}: cannot be read ({error.strerror})") from None
    match = HUB_ID.fullmatch(ref)
    if match is None or ref.startswith((".", "~")) or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise FormatError(f"{ref}: no such file or folder")
    return _from_hub(match["id"], match["revision"])


def _from_hub(repo: str, revision: str | None) -> Path:
    from huggingface_hub import constants, errors

    name = f"{repo}@{revision}" if revision else repo
    if constants.HF_HUB_OFFLINE:
        try:
            return _cached(repo, revision)
        except errors.LocalEntryNotFoundError:
            raise HubError(
                f"{name}: no such folder here, not in the Hub's cache, and the Hub cannot be asked (HF_HUB_OFFLINE)"
            ) from None
    try:
        return _download(repo, revision)
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
        try:
            # A refusal (4xx) stands; an outage does not matter where the model was downloaded before.
            if 400 <= getattr(getattr(error, "response", None), "status_code", 0) < 500:
                raise HubError(f"{name}: the Hub refuses it ({_reason(error)})") from None
            return _cached(repo, revision)
        except errors.LocalEntryNotFoundError:
            raise HubError(f"{name}: not in the cache, and the Hub cannot be reached ({_reason(error)})") from None


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    files = [entry.rfilename for entry in HfApi().model_info(repo, revision=revision).siblings or []]
    safe = any(_is_weight(file, ".safetensors") for file in files)
    # Never pickles where safetensors are there.
    allowed = [*TEXT_FILES, "*.safetensors" if safe else "*.bin"]
    return Path(snapshot_download(repo, revision=revision, allow_patterns=allowed, ignore_patterns=[*IGNORED]))


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
