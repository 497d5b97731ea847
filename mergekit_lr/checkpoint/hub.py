"""From what a user writes to a path on this disk: a local path, or a model of the Hugging Face Hub.

huggingface_hub does the work, so its cache, its token, its offline mode and its endpoint hold here.
"""

from __future__ import annotations

import re
from pathlib import Path

from mergekit_lr.errors import FormatError, HubError

HUB_ID = re.compile(r"(?P<id>[\w.-]+(/[\w.-]+)?)(@(?P<revision>[\w./-]+))?")
# What a checkpoint or an adapter needs; never pickles where safetensors are there, see ``_patterns``.
TEXT_FILES = ("*.json", "*.model", "*.txt", "*.jinja", "README.md", "LICENSE*")


def local_path(ref: str) -> Path:
    """The local file or folder that ``ref`` means; a Hub id is downloaded (or found in the cache) first.

    Raises:
        FormatError: ``ref`` is a path to nothing.
        HubError: the Hub has no such model or revision, refuses it, or cannot be reached.
    """
    path = Path(ref).expanduser()
    if path.exists():
        return path
    match = HUB_ID.fullmatch(ref)
    if match is None or ref.startswith((".", "~")) or path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise FormatError(f"{ref}: no such file or folder")
    return _download(match["id"], match["revision"])


def _download(repo: str, revision: str | None) -> Path:
    from huggingface_hub import HfApi, constants, errors, snapshot_download

    name = f"{repo}@{revision}" if revision else repo
    try:
        if constants.HF_HUB_OFFLINE:
            return Path(snapshot_download(repo, revision=revision, local_files_only=True))
        info = HfApi().model_info(repo, revision=revision)
        files = [entry.rfilename for entry in info.siblings or []]
        return Path(snapshot_download(repo, revision=revision, allow_patterns=_patterns(files)))
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
    except errors.LocalEntryNotFoundError:
        raise HubError(
            f"{name}: no such folder here, not in the Hub's cache, and the Hub cannot be asked (offline)"
        ) from None
    except (errors.HTTPError, OSError) as error:
        reason = (str(error).strip().splitlines() or [repr(error)])[0][:160]
        raise HubError(f"{name}: the Hub cannot be reached ({reason})") from None


def _patterns(files: list[str]) -> list[str]:
    """The files to fetch: weights at the top level in the safest format there is, and the small texts."""
    weights = [f for f in files if "/" not in f and f.endswith(".safetensors") and not f.startswith("consolidated")]
    if not weights:
        weights = [f for f in files if "/" not in f and f.endswith(".bin") and f != "training_args.bin"]
    return [*weights, *TEXT_FILES]
