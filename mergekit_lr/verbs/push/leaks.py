"""What no published text may hold: secrets, and paths of the machine that it was written on.

A line is looked at, never shown: a message that quotes a secret would spread it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

SECRETS = {
    "a Hugging Face token": re.compile(r"\bhf_[A-Za-z0-9]{30,}|\bapi_org_[A-Za-z0-9]{30,}"),
    "an AWS key": re.compile(r"\b(?:AKIA|ASIA)[0-9A-Z]{16}\b|aws_secret_access_key\s*[=:]\s*\S{30,}", re.IGNORECASE),
    "a private key": re.compile(r"-----BEGIN [A-Z ]*PRIVATE KEY-----"),
    "a GitHub token": re.compile(r"\bgh[pousr]_[A-Za-z0-9]{30,}|\bgithub_pat_\w{30,}"),
    "an OpenAI or Anthropic key": re.compile(r"\bsk-[\w-]{32,}"),
    "a Google key": re.compile(r"\bAIza[\w-]{35}"),
    "a Slack token": re.compile(r"\bxox[abprs]-[\w-]{10,}"),
}
# First parts of paths that say whose machine it was; a path such as /path/to/adapter in an explanation says nothing.
ROOTS = (
    "home|Users|root|mnt|media|tmp|var|opt|srv|data|datasets|scratch|work|workspace|content|kaggle|private|Volumes|"
    "lustre|gpfs|nfs|storage|export|raid|dbfs"
)
PATH = re.compile(
    rf"(?<![\w.:/~<\\-])(?:/(?:{ROOTS})/[\w.@+-]+|~/[\w.@+-]+|[A-Za-z]:(?:\\\\?|/)[\w.@+-]+)"
    r"|\bfile:///?[\w.@+-]+"
    r'|(?<=")(?:/[^"/\s]+){2,}/?(?=")'  # the whole of a JSON string
)


class Leak(NamedTuple):
    """One line that must not go out: its number, and what stands there (of a secret only the kind)."""

    line: int
    what: str
    secret: bool


def leaks(text: str, *, token: str | None = None, own: Iterable[Path] = (), paths: bool = True) -> Iterator[Leak]:
    """Every secret and every absolute path in ``text``, line by line.

    Args:
        text: the content of a file. token: the token in use, which must not stand there in whatever form it has.
        own: folders of this machine by their full paths. paths: whether paths are looked for; a vocabulary has words
            that look like some.
    """
    known = [re.compile(re.escape(str(path)) + r"(?!\w)") for path in own if len(path.parts) > 2]
    for number, line in enumerate(text.splitlines(), 1):
        kinds = [kind for kind, pattern in SECRETS.items() if pattern.search(line)]
        if token and token in line and not kinds:
            kinds = ["the token that you are logged in with"]
        yield from (Leak(number, kind, True) for kind in kinds)
        if paths and not kinds:
            found = next((match[0] for pattern in (PATH, *known) if (match := pattern.search(line))), None)
            if found is not None:
                yield Leak(number, f"the absolute path {found}", False)
