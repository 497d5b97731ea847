"""A marker planted as ``HF_TOKEN`` for the whole test run, and the search for it in all that the run leaves behind.

A pytest plugin: ``conftest.py`` takes its hooks. Looked at are the files below the run's temporary folder (texts in
full, of safetensors the header), what commands and processes print, and what pytest captures: output, logs, tracebacks.
Where the marker is found the run fails, with the name of the file or of the test.
"""

from __future__ import annotations

import os
import secrets
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

KEY = "LRMERGE_PLANTED_TOKEN"  # workers and processes inherit it
# Numbers, and pictures: nobody writes a token there, and there are many.
NO_TEXT = (".bin", ".pt", ".pth", ".ckpt", ".gguf", ".npy", ".npz", ".png", ".pyc", ".so")
_found: list[str] = []


def plant() -> str:
    """The marker, planted as the token of this process and of those that it starts."""
    marker = os.environ.setdefault(KEY, f"hf_{secrets.token_hex(17)}")
    os.environ["HF_TOKEN"] = marker
    return marker


def marker() -> str:
    """The token of this run: of the form of a real one, and of no other use."""
    return os.environ[KEY]


def refuse(*texts: str | bytes | None) -> None:
    """Fail where the marker stands in what was printed."""
    wanted = os.environ.get(KEY)  # none where tests' helpers are used by a script
    for text in texts if wanted else ():
        shown = text.decode(errors="replace") if isinstance(text, bytes) else text or ""
        if wanted in shown:  # no assert: pytest would show both
            raise AssertionError("the planted token was printed: " + shown.replace(wanted, "<token>"))


def leaking(folder: Path, wanted: str) -> Iterator[Path]:
    """Every file below ``folder`` that holds ``wanted`` as text."""
    needle = wanted.encode()
    for path in folder.rglob("*"):
        if path.is_symlink() or not path.is_file() or path.suffix in NO_TEXT:
            continue
        with path.open("rb") as file:
            if path.suffix == ".safetensors":
                held = file.read(min(int.from_bytes(file.read(8), "little"), 1 << 24))
            else:
                held = file.read()
        if needle in held:
            yield path


def pytest_configure(config: pytest.Config) -> None:
    """Plant the marker before workers start, and look at what every process prints."""
    plant()
    original = subprocess.Popen.communicate

    def communicate(self: subprocess.Popen, *arguments: Any, **options: Any) -> Any:
        printed = original(self, *arguments, **options)
        refuse(*printed)
        return printed

    if original.__module__ == "subprocess":
        subprocess.Popen.communicate = communicate  # type: ignore[method-assign]


def pytest_runtest_logreport(report: pytest.TestReport) -> None:
    """Look at what pytest captured of a test: output, logs, its traceback."""
    captured = [(title, text) for title, text in report.sections] + [("traceback", report.longreprtext)]
    _found.extend(f"{report.nodeid}: {title}" for title, text in captured if marker() in text)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Look at every file; in a run of several workers, once, when all of them are done."""
    if hasattr(session.config, "workerinput"):
        return
    base = session.config._tmp_path_factory.getbasetemp()  # type: ignore[attr-defined]
    _found.extend(str(path) for path in leaking(base, marker()))
    if _found:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """Name what leaked."""
    for place in _found:
        terminalreporter.write_line(f"LEAKED the planted token: {place}", red=True)
