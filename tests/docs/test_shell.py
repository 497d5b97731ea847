"""Completion in three shells, asked as their scripts ask it; and output without colour."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

LRMERGE = str(Path(sys.executable).parent / "lrmerge")
ASKED = {
    "bash": lambda words: {"COMP_WORDS": words, "COMP_CWORD": str(len(words.split(" ")) - 1)},
    "zsh": lambda words: {"_TYPER_COMPLETE_ARGS": words},
    "fish": lambda words: {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"},
}


def asked(shell: str, words: str, **more: str) -> subprocess.CompletedProcess[str]:
    environment = os.environ | {"_LRMERGE_COMPLETE": f"complete_{shell}"} | ASKED[shell](words) | more
    return subprocess.run([LRMERGE], capture_output=True, text=True, env=environment)


@pytest.mark.parametrize("shell", ASKED)
def test_names_of_methods_are_completed(shell: str):
    found = asked(shell, "lrmerge methods dare").stdout
    assert "dare_linear" in found
    assert "dare_ties" in found
    assert "della" not in found


def test_commands_and_choices_are_completed():
    assert asked("bash", "lrmerge ins").stdout.split() == ["inspect"]
    assert asked("bash", "lrmerge convert x --to ").stdout.split() == ["peft", "kohya", "lycoris", "diffusers", "comfy"]


def test_files_are_left_to_the_shell():
    """No answer of ours: bash and fish then complete files, and zsh is told to."""
    assert asked("bash", "lrmerge merge rec").stdout.split() == []
    assert asked("zsh", "lrmerge merge rec").stdout.strip() == "_files"
    assert asked("fish", "lrmerge merge rec", _TYPER_COMPLETE_FISH_ACTION="is-args").returncode != 0


def test_completion_does_not_import_torch():
    from lrmerge.methods import known_names

    from mergekit_lr.methods.registry import methods

    assert known_names("") == sorted(methods())
    code = "import sys; from lrmerge.methods import known_names; known_names('t'); assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_no_colour_where_nobody_wants_it():
    plain = os.environ | {"NO_COLOR": "1", "FORCE_COLOR": "1"}
    ended = subprocess.run([LRMERGE, "methods", "ties"], capture_output=True, text=True, env=plain)
    assert ended.returncode == 0
    assert "\x1b[3" not in ended.stdout
