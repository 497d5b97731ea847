"""The world of the pages, made once, and the modules beside the tests."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE.parent), str(HERE)]


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> Path:
    """A folder with models, adapters and the examples."""
    from world import build

    return build(tmp_path_factory.mktemp("world"))
