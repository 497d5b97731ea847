"""A small Hugging Face Hub on this machine: what huggingface_hub asks of one, over real HTTP.

It knows repositories with revisions, private and gated ones, and records every request with its Authorization header.
Endpoints: model information, tree listing, and resolving a file (HEAD and GET), large files behind a redirect as on
the Hub itself.
"""

from __future__ import annotations

import hashlib
import json
import threading
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

TOKEN = "hf_onlyForThisTest"


@dataclass
class Repository:
    """files: by revision (branch, tag) the content of every path. access: public, private or gated."""

    files: dict[str, dict[str, bytes]]
    access: str = "public"

    def commit(self, revision: str) -> str | None:
        """The commit that a revision (or a commit itself) means; None where there is none."""
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.files}
        return commits.get(revision) or next((c for c in commits.values() if c == revision), None)

    def at(self, commit: str) -> dict[str, bytes]:
        """Every file of a commit."""
        return next(files for name, files in self.files.items() if self.commit(name) == commit)


@dataclass
class Hub:
    """The running server. requests: (method, path, Authorization header) of every request so far."""

    endpoint: str
    repositories: dict[str, Repository]
    requests: list[tuple[str, str, str | None]] = field(default_factory=list)
    down: bool = False

    def fetched(self) -> set[str]:
        """Names of the files whose content was sent."""
        paths = (path for method, path, _ in self.requests if method == "GET")
        return {path.rpartition("/")[2] for path in paths if path.startswith("blob/")}


@contextmanager
def hub(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Serve ``repositories`` by ``org/name`` while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = Hub(f"http://127.0.0.1:{server.server_port}", repositories)
    server.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    @property
    def hub(self) -> Hub:
        return self.server.state  # type: ignore[attr-defined]

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def _answer(self) -> None:
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path).strip("/")
        token = self.headers.get("Authorization")
        self.hub.requests.append((self.command, path, token))
        parts = path.split("/")
        if self.hub.down:
            return self._send(503, b"down")
        if parts[0] == "blob":  # where a redirect leads: the name of a file's digest, then its own name
            return self._send(200, self._blob(parts[1]))
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:], token)
        if "resolve" in parts:
            at = parts.index("resolve")
            return self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]), token)
        return self._send(404, b"")

    def _commit(self, repo: str, revision: str, token: str | None) -> tuple[Repository, str] | None:
        """The repository and commit that are asked for, or None when the refusal has been sent."""
        found = self.hub.repositories.get(repo)
        allowed = token == f"Bearer {TOKEN}"
        if found is None or (found.access == "private" and not allowed):
            # To those who may not see it, a private repository is one that does not exist.
            self._refuse(404 if token else 401, "RepoNotFound", "Repository not found")
        elif found.access == "gated" and not allowed:
            self._refuse(403 if token else 401, "GatedRepo", "Access to this model is restricted")
        elif (commit := found.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found, commit
        return None

    def _api(self, repo: str, rest: list[str], token: str | None) -> None:
        revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"]) else "main"
        if (found := self._commit(repo, revision, token)) is None:
            return
        repository, commit = found
        files = repository.at(commit)
        if rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}
                | ({"lfs": {"oid": _digest(data), "size": len(data), "pointerSize": 130}} if _large(path) else {})
                for path, data in files.items()
            ]
            return self._send(200, json.dumps(listing).encode(), kind="application/json")
        siblings = [{"rfilename": path} for path in files]
        information = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "private": False, "siblings": siblings}
        return self._send(200, json.dumps(information).encode(), kind="application/json")

    def _resolve(self, repo: str, revision: str, path: str, token: str | None) -> None:
        if (found := self._commit(repo, revision, token)) is None:
            return
        repository, commit = found
        data = repository.at(commit).get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        digest = _digest(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{digest}"'}
        if _large(path) or self.command == "GET":
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{digest}"'}
            # Under another name of this machine: the Hub's storage is another host, which no token may reach.
            headers |= {"Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/blob/{digest}/{path}"}
            return self._send(302, b"", headers)
        return self._send(200, data, headers)

    def _blob(self, digest: str) -> bytes:
        contents = (
            data for r in self.hub.repositories.values() for files in r.files.values() for data in files.values()
        )
        return next(data for data in contents if _digest(data) == digest)

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, kind: str = "") -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)


def _digest(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def _large(path: str) -> bool:
    return path.endswith((".safetensors", ".bin"))
