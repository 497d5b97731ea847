"""What the Hub and the network refuse: one line each, what to do about it, and never the token."""

from __future__ import annotations

import traceback
from pathlib import Path

import planted
import pytest
import tiny
from hub_server import Fault, Hub, Repository
from pushing import REPO, copied, files, push, refused, results, with_base

import mergekit_lr as lr
from mergekit_lr.verbs.push import refusals, verb

LIMIT = {"ratelimit": '"api";r=0;t=7', "ratelimit-policy": '"fixed window";"api";q=500;w=300'}


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> Path:
    return results(tmp_path_factory.mktemp("results"))


@pytest.fixture
def adapter(made, tmp_path, served) -> Path:
    with_base(served)
    return copied(made / "adapter", tmp_path / "adapter")


@pytest.mark.parametrize(
    ("status", "at", "words"),
    [
        (401, "repos/create", ("does not take the token", "from HF_TOKEN", "settings/tokens")),
        (403, "repos/create", ("write access", "said by the Hub", "--create-pr")),
        (403, "preupload", ("write access", "said by the Hub")),
        (404, "preupload", ("not found", "spelling")),
        (409, "preupload", ("changed by someone else", "again")),
        (412, "commit", ("changed by someone else", "committing", "again")),
        (413, "commit", ("too large", "--shard-size", "said by the Hub")),
        (413, "objects/batch", ("too large", "--shard-size")),
        (418, "commit", ("refuses", "said by the Hub")),
        (429, "commit", ("too many requests", "same command goes on")),
        (429, "preupload", ("too many requests", "same command goes on")),
        (500, "commit", ("trouble of its own", "500", "same command goes on")),
        (502, "objects/batch", ("trouble of its own", "502")),
        (503, "lfs/", ("trouble of its own", "503", "adapter_model.safetensors")),
    ],
)
def test_an_answer_of_the_hub(served: Hub, adapter, status, at, words):
    method = "PUT" if at == "lfs/" else "POST"
    served.faults.append(Fault(method, at, status=status, message="said by the Hub", times=100))
    refused(push(adapter), REPO, *words)
    assert files(served) == {} if REPO in served.repositories else True
    assert served.commits == []


@pytest.mark.parametrize(
    ("status", "headers", "waited"), [(429, LIMIT, 8), (429, {"Retry-After": "3"}, 4), (503, {}, 1)]
)
def test_a_busy_hub_is_asked_again(served: Hub, adapter, waits, status, headers, waited):
    served.faults.append(Fault("POST", "preupload", status=status, headers=headers))
    assert push(adapter).code == 0
    assert waits == [waited]


def test_a_repository_that_changes_meanwhile_is_looked_at_again(served: Hub, adapter, monkeypatch):
    assert push(adapter).code == 0
    (adapter / "LICENSE").write_text("mine")
    there = served.repositories[REPO].files["main"]
    with monkeypatch.context() as patch:
        patch.setattr(verb, "_create", lambda *_: there.update({"README.md": there["README.md"] + b"\nMeanwhile.\n"}))
        refused(push(adapter), REPO, "changed by someone else", "committing", "again")
    assert "LICENSE" not in files(served)
    assert push(adapter).code == 0
    assert b"Meanwhile." in files(served)["README.md"]
    assert files(served)["LICENSE"] == b"mine"


def test_a_card_that_the_hub_refuses(served: Hub, adapter):
    served.faults.append(Fault("POST", "validate-yaml", status=400, message="language must be known"))
    refused(push(adapter), "README.md", "language must be known")
    assert REPO not in served.repositories


def test_no_login(served: Hub, adapter, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    refused(push(adapter), "hf auth login", "HF_TOKEN")
    assert push(adapter, "--dry-run").code == 0


def test_a_stored_login_is_used_and_named_where_it_is_refused(served: Hub, adapter, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.delenv("HF_TOKEN")
    stored = Path(constants.HF_TOKEN_PATH)
    stored.parent.mkdir(parents=True, exist_ok=True)
    stored.write_text("hf_storedButRevoked")
    served.revoked.add("hf_storedButRevoked")
    line = refused(push(adapter), "does not take the token", "of the stored login")
    assert "hf_stored" not in line


def test_a_token_that_may_only_read(served: Hub, adapter):
    served.readonly = True
    refused(push(adapter), "write access", "rights to create")
    served.repositories[REPO] = Repository({"main": {}})
    refused(push(adapter), "write access", "only read")


def test_a_name_of_someone_else(served: Hub, adapter):
    refused(push(adapter, repo="closed/result"), "closed/result", "write access")


@pytest.mark.parametrize("name", ["a/b/c", "org/na me", "org/", "/abs/path", "org/name@v1", "org/.."])
def test_no_name_of_a_repository(served: Hub, adapter, name):
    refused(push(adapter, repo=name), name, "org/name", code=2)


def test_a_connection_that_always_breaks(served: Hub, adapter, waits):
    served.faults.append(Fault("PUT", "lfs/", cut=50, times=100))
    refused(push(adapter), "adapter_model.safetensors", "connection broke", "same command goes on")
    assert len(waits) == 5


def test_a_hub_that_falls_silent(served: Hub, adapter, monkeypatch):
    monkeypatch.setattr(refusals, "SILENCE", 0.2)
    served.faults.append(Fault("POST", "commit", silent=2, times=100))
    refused(push(adapter), "connection broke", "committing", "timed out")


def test_a_hub_that_is_not_there(served: Hub, adapter, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    refused(push(adapter), REPO, "cannot be reached")


def test_offline(served: Hub, adapter, monkeypatch):
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refused(push(adapter), "HF_HUB_OFFLINE")


@pytest.mark.parametrize("more", ["\x01", " x", "é", "\tx"])
def test_a_token_that_cannot_be_sent_is_not_shown(served: Hub, adapter, monkeypatch, more):
    monkeypatch.setenv("HF_TOKEN", f"{planted.marker()}{more}")
    with pytest.raises(lr.LrmergeError) as caught:
        lr.push(adapter, REPO, base_model="org/base")
    assert planted.marker() not in "".join(traceback.format_exception(caught.value))
    refused(tiny.lrmerge("inspect", "org/none"), "org/none")


def test_an_answer_that_is_none_of_a_hub(served: Hub, adapter):
    served.faults.append(Fault("POST", "repos/create", status=200, message="a page of a proxy"))
    refused(push(adapter), REPO, "is not understood", "HF_ENDPOINT")


def test_an_answer_that_repeats_the_token_is_not_shown(served: Hub, adapter):
    served.faults.append(Fault("POST", "commit", status=400, message=f"bad header {planted.marker()}"))
    assert "<token>" in refused(push(adapter), REPO)
