"""What all tests share: a planted token that must appear nowhere, and a small Hub to push to."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from types import SimpleNamespace

import planted
import pytest
from hub_server import Hub, hub

# Hooks of the plugin.
from planted import (
    pytest_configure,
    pytest_runtest_logreport,
    pytest_sessionfinish,
    pytest_terminal_summary,
)

__all__ = ["pytest_configure", "pytest_runtest_logreport", "pytest_sessionfinish", "pytest_terminal_summary"]


@pytest.fixture
def waits(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """Seconds that huggingface_hub would have waited before it tried again; it does not wait."""
    from huggingface_hub.utils import _http

    waited: list[float] = []
    monkeypatch.setattr(_http, "time", SimpleNamespace(sleep=waited.append))
    return waited


@pytest.fixture
def served(tmp_path, monkeypatch: pytest.MonkeyPatch, waits) -> Iterator[Hub]:
    """A Hub without repositories whose owner has the planted token; huggingface_hub asks it and no other.

    Uploads go by LFS: the client has the choice of Xet from ``HF_HUB_DISABLE_XET`` alone.
    """
    from huggingface_hub import close_session, constants

    # The client uploads by a deprecated argument of its HTTP library.
    warnings.filterwarnings("ignore", "Use 'content=", DeprecationWarning)
    with hub({}, token=planted.marker()) as running:
        settings = {
            "ENDPOINT": running.endpoint,
            "HUGGINGFACE_CO_URL_TEMPLATE": running.endpoint + "/{repo_id}/resolve/{revision}/{filename}",
            "HF_HUB_CACHE": str(tmp_path / "cache" / "hub"),
            "HF_HOME": str(tmp_path / "cache"),
            "HF_TOKEN_PATH": str(tmp_path / "cache" / "token"),
            "HF_HUB_DISABLE_XET": True,
        }
        for name, value in settings.items():
            monkeypatch.setattr(constants, name, value)
        close_session()
        yield running
        close_session()
