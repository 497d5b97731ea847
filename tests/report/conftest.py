"""Cards are tested on results of every verb, made once."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from results import World, make


@pytest.fixture(scope="session")
def world(tmp_path_factory) -> World:
    """Tests only read it."""
    return make(tmp_path_factory.mktemp("world"))
