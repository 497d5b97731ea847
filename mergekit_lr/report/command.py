"""The command that makes a result again, from the options that its manifest holds."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from typing import Any

from mergekit_lr.report.inputs import Input, portable
from mergekit_lr.report.markdown import fenced

# How fast and where it ran decides nothing of the result.
_OF_THE_RUN = ("memory", "device", "threads")
# What holds where nothing is said; an option of this value goes without saying.
_DEFAULTS = {"multiple_of": 1, "embeddings": "lora", "rest": "full", "vocab": "refuse", "seed": 0}
_DEFAULTS |= {"dora": "keep", "rounding": "nearest"}


def command(
    verb: str,
    positional: Sequence[str],
    options: Mapping[str, Any],
    inputs: Sequence[Input],
    *,
    out: Sequence[str] = ("-o", "OUT"),
) -> str:
    """``lrmerge VERB ...`` as a block of Markdown, inputs under the names that a card gives them."""
    lines = [shlex.join(["lrmerge", verb, *positional, *out])]
    for key, value in options.items():
        if key in _OF_THE_RUN or value is None or value is False or value == [] or value == {}:
            continue
        if key in _DEFAULTS and value == _DEFAULTS[key]:
            continue
        flag = f"--{key.replace('_', '-')}"
        if isinstance(value, Mapping):
            lines += [shlex.join([flag, f"{pattern}={one}"]) for pattern, one in value.items()]
        elif isinstance(value, list | tuple):
            lines += [shlex.join([flag, str(one)]) for one in value]
        elif value is True:
            lines.append(flag)
        else:
            lines.append(shlex.join([flag, portable(str(value), inputs)]))
    text = " ".join(lines) if sum(map(len, lines)) < 100 else " \\\n    ".join(lines)
    return fenced(text, "sh")
