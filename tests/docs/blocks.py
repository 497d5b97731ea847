"""The fenced blocks of a page: reading them, running them, and comparing what they print with what the page shows.

    ```console   lines "$ command" with what they print; a line "..." stands for any lines
    ```sh, ```   commands without output; those of this program are run, others are for the reader
    ```yaml      a file, if its first line is a comment with the name of one
    ```python    run, all of a page in one namespace

What must differ between machines (times, rates, memory) is not compared, other numbers within a few per cent.
"""

from __future__ import annotations

import contextlib
import io
import re
import shlex
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple
from unittest.mock import patch

WIDTH = 100
FENCE = re.compile(r"^```(\w*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
OWN = re.compile(r"^\s*(?:\$ )?lrmerge ")
PROGRESS = re.compile(r"^[\w ]+: (?:\d+%|[\d.]+ [kMGT]?B) of .*\n", re.MULTILINE)
VARIES = [
    (re.compile(r"\b\d+ min \d+ s\b|\b\d+ h \d+ min\b|\b\d+(?:\.\d+)? (?:s|ms)\b"), "TIME"),
    (re.compile(r"\b\d+(?:\.\d+)? [kMGT]?B/s\b"), "RATE"),
    (re.compile(r"peak memory \d+(?:\.\d+)? [kMGT]?B"), "peak memory SIZE"),
    (re.compile(r"\b\d+(?:\.\d+)? [kM]?B(?= to send|, opens)"), "SIZE"),  # of texts whose words may change
    (re.compile(r"with \d+ workers"), "with N workers"),
    (re.compile(r"[▁▂▃▄▅▆▇█]"), "▄"),
    (re.compile(r"\s+"), " "),
]
NUMBER = re.compile(r"(?:(?<= )-)?\d+(?:\.\d+)?(?:e[+-]?\d+)?")


class Block(NamedTuple):
    """A fenced block: its language, its text, and where in the page the text begins and ends."""

    language: str
    text: str
    start: int
    end: int


def blocks(page: str) -> Iterator[Block]:
    """The fenced blocks of a page, in order."""
    for match in FENCE.finditer(page):
        yield Block(match[1], match[2], match.start(2), match.end(2))


def commands(text: str) -> list[str]:
    """The commands of this program in a block, each on one line and without its comment."""
    lines = text.replace("\\\n", " ").splitlines()
    return [line.removeprefix("$ ").partition(" #")[0].strip() for line in lines if OWN.match(line)]


class Step(NamedTuple):
    """A command of a console block and the lines that the page shows below it."""

    command: str
    shown: str


def steps(text: str) -> list[Step]:
    """The commands of a console block; a backslash at the end of a line continues it."""
    parts = re.split(r"^\$ ((?:.*\\\n)*.*)\n", text, flags=re.MULTILINE)
    assert parts[0] == "", f"a console block begins with '$ ', not with {parts[0]!r}"
    return [Step(command, shown) for command, shown in zip(parts[1::2], parts[2::2], strict=True)]


def run(command: str) -> str:
    """What a command prints on both streams, without progress. Ours run in this process, ``cat`` and ``ls`` are read.

    Raises:
        AssertionError: the command failed and said nothing of it.
    """
    words = shlex.split(command.replace("\\\n", " "))
    if words[0] == "cat":
        return "".join(Path(name).read_text() for name in words[1:])
    if words[0] == "ls":
        return "".join(f"{path.name}\n" for path in sorted(Path(words[1]).iterdir()))
    assert words[0] == "lrmerge", f"not a command that can be run here: {command}"
    from huggingface_hub import constants
    from lrmerge import console
    from lrmerge.app import main

    printed, code = io.StringIO(), 0
    wide = [patch.object(one, "_width", WIDTH) for one in (console.out, console.err)]
    caught = contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed)
    with wide[0], wide[1], caught[0], caught[1], patch("sys.argv", words):
        try:
            main()
        except SystemExit as end:
            code = int(end.code or 0)
    text = PROGRESS.sub("", printed.getvalue()).replace(f"{Path.cwd()}/", "")
    text = text.replace(constants.ENDPOINT, "https://huggingface.co")
    assert code == 0 or "error: " in text, f"{command} ended with {code}: {text}"
    return "".join(f"{line.rstrip()}\n" for line in text.splitlines())


def differs(shown: str, printed: str) -> str | None:
    """What is wrong with what a page shows, or None."""
    wanted = [re.sub(r"\s+", " ", part).strip() for part in re.split(r"^ *\.\.\.$", shown, flags=re.MULTILINE)]
    found, at = _plain(printed), 0
    for i, part in enumerate(wanted):
        expected = _plain(part)
        pattern = f"({NUMBER.pattern})".join(map(re.escape, NUMBER.split(expected)))
        anchored = (r"\A" if i == 0 else "") + pattern + (r"\Z" if i == len(wanted) - 1 else "")
        for match in re.finditer(anchored, found[at:]):
            if all(_near(a, b) for a, b in zip(NUMBER.findall(expected), match.groups(), strict=True)):
                at += match.end()
                break
        else:
            return f"the page shows\n{part}\nbut it is\n{printed}"
    return None


def _plain(text: str) -> str:
    for pattern, word in VARIES:
        text = pattern.sub(word, text)
    return text.strip()


def _near(shown: str, printed: str) -> bool:
    """Equal within 3 %, or within two of the last decimal that is shown."""
    decimals = len(shown.partition(".")[2]) if "e" not in shown else 0
    slack = 2 * 10**-decimals if decimals else 0
    return abs(float(shown) - float(printed)) <= 0.03 * abs(float(shown)) + slack


def filled(page: str) -> str:
    """The page with every console block's output as it is now, except where it has a line "..."."""
    parts, last = [], 0
    names: dict[str, object] = {"__name__": "page"}
    for block in blocks(page):
        perform(block, names, check=False)
        if block.language == "console":
            text = "".join(f"$ {step.command}\n{_kept(step)}" for step in steps(block.text))
            parts += [page[last : block.start], text]
            last = block.end
    return "".join([*parts, page[last:]])


_LAST: dict[str, str] = {}


def _kept(step: Step) -> str:
    """What to show below a command: its output, or what the page has where that leaves lines out."""
    printed = _LAST[step.command]
    wanted = "error: " in step.shown
    assert wanted == ("error: " in printed), f"$ {step.command}\nerror {'' if wanted else 'not '}expected: {printed}"
    return step.shown if re.search(r"^ *\.\.\.$", step.shown, re.MULTILINE) else printed


def perform(block: Block, names: dict[str, object], *, check: bool = True) -> None:
    """Does what a block says, in the present folder.

    Raises:
        AssertionError: a command prints something else than the page shows.
    """
    match block.language:
        case "console":
            for step in steps(block.text):
                printed = _LAST[step.command] = run(step.command)
                problem = differs(step.shown, printed) if check else None
                assert problem is None, f"$ {step.command}\n{problem}"
        case "sh" | "":
            for command in commands(block.text):
                run(command)
        case "yaml" if name := re.match(r"# ([\w/.-]+\.yaml)\n", block.text):
            Path(name[1]).write_text(block.text)
        case "python":
            with contextlib.redirect_stdout(io.StringIO()):
                exec(compile(block.text, "page", "exec", dont_inherit=True), names)
