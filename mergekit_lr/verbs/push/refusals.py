"""What the Hub's library raises, as one line: what was refused, and what to do about it."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

from mergekit_lr.errors import HubError

SETTINGS = "https://huggingface.co/settings/tokens"
AGAIN = "what was sent is kept there, so the same command goes on from it"
# hf_xet has no other form for what its storage, or the Hub, answered to it.
XET_STATUS = re.compile(r"HTTP status (?:client|server) error \((\d{3}) ")
# Seconds without a byte after which a connection counts as broken; by itself the library waits for ever.
SILENCE = 300.0


@contextmanager
def told(repo: str, doing: str) -> Iterator[None]:
    """Say in one HubError what stopped the library while ``doing`` something with ``repo``."""
    from huggingface_hub import errors, get_session

    session = get_session()
    if session.timeout.read is None:
        session.timeout = SILENCE
    try:
        yield
    except (errors.HTTPError, OSError, RuntimeError, ValueError, KeyError) as error:  # pyright: ignore[reportPrivateImportUsage]
        raise HubError(without_token(f"{repo}: {_refusal(error, doing)}")) from None


def without_token(text: str) -> str:
    """``text`` without the token in use: a library may quote a header that it could not send."""
    from huggingface_hub import get_token

    for token in {os.environ.get("HF_TOKEN", "").strip(), get_token() or ""}:
        text = text.replace(token, "<token>") if token else text
    return text


def _refusal(error: Exception, doing: str) -> str:
    """The reason and the way out, by the status that the Hub answered, or by how the connection failed."""
    from huggingface_hub import constants, errors

    cause = error
    while not isinstance(cause, errors.HfHubHTTPError) and isinstance(cause.__cause__, Exception):
        cause = cause.__cause__  # an upload's own error is wrapped once or twice
    if constants.HF_HUB_OFFLINE:
        return f"the Hub cannot be asked while {doing} (HF_HUB_OFFLINE is set); unset it"
    if isinstance(cause, errors.RevisionNotFoundError):
        return "has no such revision; name a branch, or leave --revision out"
    if isinstance(cause, UnicodeEncodeError):
        return f"the token ({_place()}) has characters that no token has; log in anew with `hf auth login`"
    status = getattr(getattr(cause, "response", None), "status_code", None)
    if status is None and (named := XET_STATUS.search(str(cause))):
        status = int(named[1])
    said = _words(cause)
    match status:
        case 401:
            return (
                f"the Hub does not take the token ({_place()}) while {doing}; make one at {SETTINGS}, then log in anew"
            )
        case 403:
            return (
                f"the token may not do this ({doing}): it needs write access to this name; make one at {SETTINGS}, or "
                f"offer the files with --create-pr ({said})"
            )
        case 404:
            return f"not found while {doing}; check the spelling, and that the token ({_place()}) may see it ({said})"
        case 409 | 412:
            return f"was changed by someone else while {doing}; run the same command again ({said})"
        case 413:
            return f"a file or the whole is too large for the Hub ({said}); write smaller shards with --shard-size"
        case 429:
            return f"the Hub has had too many requests ({said}); wait a little, {AGAIN}"
        case int() if status >= 500:
            return f"the Hub has trouble of its own while {doing} ({status}); try again later, {AGAIN}"
        case int():
            return f"the Hub refuses it while {doing} ({said})"
        case _ if isinstance(cause, (KeyError, ValueError)):
            return f"the Hub's answer while {doing} is not understood ({said}); is HF_ENDPOINT a Hub?"
        case _:
            return f"the connection broke or the Hub cannot be reached while {doing} ({said}); {AGAIN}"


def _place() -> str:
    return "from HF_TOKEN" if os.environ.get("HF_TOKEN") else "of the stored login"


def _words(error: Exception) -> str:
    """What the Hub itself said, else the library's message: of an answer without words its first line."""
    text = getattr(error, "server_message", None)
    if text is None:
        text = str(error) if isinstance(error, ValueError) else (str(error).strip().splitlines() or [""])[0]
    return " ".join(text.split())[:200] or type(error).__name__
