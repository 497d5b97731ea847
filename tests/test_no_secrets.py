"""No token in anything that a test run writes or prints: the search itself, shown on leaks that are made on purpose."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import planted
import pytest
import torch
from safetensors.torch import save_file

OTHER = "hf_notTheOneOfThisRun0123456789abcdef"
LEAKY = """
import os, subprocess, sys, warnings

def test_file(tmp_path):
    (tmp_path / "run.log").write_text("Authorization: Bearer " + os.environ["HF_TOKEN"])

def test_output():
    print("with", os.environ["HF_TOKEN"])

def test_traceback():
    raise ValueError(os.environ["HF_TOKEN"])

def test_process():
    subprocess.run([sys.executable, "-c", "import os; print(os.environ['HF_TOKEN'])"], capture_output=True)
"""


def test_the_marker_is_the_token_in_use():
    from huggingface_hub import get_token

    assert get_token() == planted.marker()
    assert len(planted.marker()) > 30


def test_files_with_the_token_are_found(tmp_path):
    weights = {"x": torch.zeros(4)}
    (tmp_path / "deep").mkdir()
    (tmp_path / "deep" / "lrmerge.json").write_text(f'{{"token": "{OTHER}"}}')
    (tmp_path / "README.md").write_text("a card\n" * 1000 + OTHER)
    (tmp_path / "clean.md").write_text("a card")
    save_file(weights, tmp_path / "named.safetensors", metadata={"by": OTHER})
    save_file(weights, tmp_path / "clean.safetensors")
    with (tmp_path / "clean.safetensors").open("ab") as file:
        file.write(OTHER.encode())  # beyond the header: weights are not looked at
    found = {path.name for path in planted.leaking(tmp_path, OTHER)}
    assert found == {"lrmerge.json", "README.md", "named.safetensors"}


def test_printed_text_with_the_token_is_refused():
    with pytest.raises(AssertionError, match="printed") as caught:
        planted.refuse("fine", f"Bearer {planted.marker()}".encode())
    assert planted.marker() not in str(caught.value)


@pytest.fixture(scope="module", params=[(), ("-n", "1")], ids=["alone", "worker"])
def leaky(request, tmp_path_factory) -> subprocess.CompletedProcess[str]:
    """A test run of its own that leaks in every way, with a marker of its own."""
    folder = tmp_path_factory.mktemp("leaky")
    (folder / "test_leaky.py").write_text(LEAKY)
    own = (planted.KEY, "HF_TOKEN")
    clean = {key: value for key, value in os.environ.items() if key not in own and not key.startswith("PYTEST_")}
    command = [sys.executable, "-m", "pytest", "-p", "planted", "-p", "no:cacheprovider", "test_leaky.py"]
    options = (*request.param, "--basetemp", str(folder / "inner"))
    paths = {"PYTHONPATH": str(Path(__file__).parent)}
    return subprocess.run([*command, *options], cwd=folder, env=clean | paths, capture_output=True, text=True)


@pytest.mark.parametrize("place", ["run.log", "test_leaky.py::test_output", "test_leaky.py::test_traceback"])
def test_a_run_that_leaks_fails_and_says_where(leaky, place):
    assert leaky.returncode == 1
    assert any("LEAKED" in line and place in line for line in leaky.stdout.splitlines()), leaky.stdout


def test_a_process_that_prints_the_token_fails_its_test(leaky):
    assert "the planted token was printed: <token>" in leaky.stdout
