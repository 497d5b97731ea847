"""What may be imported when: no optional library at import time, no torch for ``lrmerge --help``."""

from __future__ import annotations

import subprocess
import sys

OPTIONAL = (
    "peft",
    "transformers",
    "diffusers",
    "accelerate",
    "cupy",
    "matplotlib",
    "vl_convert",
    "ray",
    "triton",
)

WITHOUT_OPTIONAL = f"""
import sys
from importlib import import_module
from importlib.abc import MetaPathFinder
from pkgutil import walk_packages

class Wall(MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {OPTIONAL!r}:
            raise ModuleNotFoundError(f"{{name}} is behind the wall", name=name)

sys.meta_path.insert(0, Wall())
"""

EVERY_MODULE = """
for package in ("lrgpu", "mergekit_lr", "lrmerge"):
    root = import_module(package)
    for module in walk_packages(root.__path__, package + "."):
        if not module.name.endswith("__main__"):
            print(import_module(module.name).__name__)
"""

HELP = """
import contextlib
from lrmerge.app import main

sys.argv = ["lrmerge", "--help"]
with contextlib.suppress(SystemExit):
    main()
"""


def run(program: str) -> str:
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_every_module_imports_without_optional_libraries():
    names = run(WITHOUT_OPTIONAL + EVERY_MODULE).split()
    assert {"lrgpu.truncated", "mergekit_lr.errors", "lrmerge.app"} <= set(names)


def test_help_works_without_optional_libraries():
    assert "extract" in run(WITHOUT_OPTIONAL + HELP)


def test_help_does_not_import_torch():
    heavy = "\nprint('LOADED', sorted({'torch', 'scipy', 'transformers'} & sys.modules.keys()))"
    assert "LOADED []" in run("import sys" + HELP + heavy)


def test_module_runs_as_a_program():
    done = subprocess.run([sys.executable, "-m", "lrmerge", "--help"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "extract" in done.stdout
