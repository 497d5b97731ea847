"""A small Hugging Face Hub on this machine: what huggingface_hub asks of one, over real HTTP.

It knows repositories with revisions, private and gated ones, and records every request with its Authorization header.
Reading: model information, tree listing, and resolving a file (HEAD and GET, byte ranges), large files behind a
redirect as on the Hub itself. Writing is in ``hub_writing``, what it holds and what goes wrong in ``hub_state``.

Where hf_xet is installed the client takes no other way than Xet, whatever the server answers, unless
``HF_HUB_DISABLE_XET=1`` is set; then it uploads as LFS. Xet storage is another service, for which a Hub only gives a
token and an address; this one gives that of a folder, which hf_xet takes for a storage as well.
"""

from __future__ import annotations

import json
import threading
import time
import urllib.parse
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from hub_state import TOKEN, Fault, Hub, Repository, digest, git_name, is_large
from hub_writing import Writing

__all__ = ["TOKEN", "Fault", "Hub", "Repository", "hub"]
BLOCK = 4096  # bytes read at once of what a client sends


@contextmanager
def hub(repositories: dict[str, Repository], *, token: str = TOKEN) -> Iterator[Hub]:
    """Serve ``repositories`` by ``org/name`` to those who have ``token`` while the context lasts."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Handler)
    server.daemon_threads = True
    state = Hub(f"http://127.0.0.1:{server.server_port}", repositories, token)
    server.state = state  # type: ignore[attr-defined]
    thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    try:
        yield state
    finally:
        server.shutdown()
        server.server_close()


class _Handler(Writing, BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fault: Fault | None = None

    @property
    def hub(self) -> Hub:  # type: ignore[override]
        return self.server.state  # type: ignore[attr-defined]

    @property
    def token(self) -> str | None:
        return self.headers.get("Authorization")

    @property
    def logged_in(self) -> bool:
        return self.token == f"Bearer {self.hub.token}"

    def log_message(self, format: str, *args: object) -> None:
        """Say nothing on stderr."""

    def do_HEAD(self) -> None:
        self._answer()

    def do_GET(self) -> None:
        self._answer()

    def do_POST(self) -> None:
        self._answer()

    def do_PUT(self) -> None:
        self._answer()

    def _answer(self) -> None:
        address = urllib.parse.urlsplit(self.path)
        path = urllib.parse.unquote(address.path).strip("/")
        self.hub.requests.append((self.command, path, self.token))
        self.fault = fault = self.hub.fault(self.command, path)
        body = self._body(path)
        if body is None:
            return None
        if self.hub.down:
            return self._send(503, b"down")
        if fault and fault.silent:
            time.sleep(fault.silent)
        if fault and fault.status:
            return self._send(fault.status, json.dumps({"error": fault.message}).encode(), dict(fault.headers))
        parts = path.replace(".git/info", "/info").split("/")
        if self.command == "PUT":
            return self._send(*_with_body(self.put(parts, body)))
        if self.command == "POST" and parts[:2] == ["api", "validate-yaml"]:
            return self._json(*self.validate(body))
        if self.command == "POST":
            return self._write(parts, body, urllib.parse.parse_qs(address.query))
        return self._read(parts)

    def _write(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> None:
        if not self.logged_in and parts[0] != "lfs":
            return self._refuse(401, "", "Invalid credentials in Authorization header")
        if parts[:2] == ["api", "models"] and "/".join(parts[2:4]) not in self.hub.repositories:
            return self._refuse(404, "RepoNotFound", "Repository not found")
        return self._json(*self.post(parts, body, query))

    def _read(self, parts: list[str]) -> None:
        if parts[0] == "blob":  # where a redirect leads: the name of a file's digest, then its own name
            return self._range("/".join(parts), self._blob(parts[1]))
        if parts[:2] == ["api", "whoami-v2"]:
            if not self.logged_in:
                return self._refuse(401, "", "Invalid credentials in Authorization header")
            return self._json(200, {"type": "user", "name": "me", "orgs": []})
        if parts[4:5] == ["xet-write-token"]:
            if not self.logged_in or self.hub.xet is None:
                return self._refuse(403, "", "no writing here")
            later = int(time.time()) + 3600
            return self._json(200, {"casUrl": f"local://{self.hub.xet}", "exp": later, "accessToken": "for Xet alone"})
        if parts[:2] == ["api", "models"]:
            return self._api("/".join(parts[2:4]), parts[4:])
        if parts[:2] == ["api", "collections"]:
            return self._json(200, self.described("/".join(parts[2:])))
        if "resolve" in parts:
            at = parts.index("resolve")
            return self._resolve("/".join(parts[:at]), parts[at + 1], "/".join(parts[at + 2 :]))
        return self._send(404, b"")

    def _commit_of(self, repo: str, revision: str) -> tuple[Repository, str] | None:
        """The repository and commit that are asked for, or None when the refusal has been sent."""
        found = self.hub.repositories.get(repo)
        if self.token and self.token.removeprefix("Bearer ") in self.hub.revoked:
            self._refuse(401, "", "Invalid credentials in Authorization header")
        elif found is None or (found.access == "private" and not self.logged_in):
            # To those who may not see it, a private repository is one that does not exist.
            self._refuse(404 if self.token else 401, "RepoNotFound", "Repository not found")
        elif found.access == "gated" and not self.logged_in:
            self._refuse(403 if self.token else 401, "GatedRepo", "Access to this model is restricted")
        elif (commit := found.commit(revision)) is None:
            self._refuse(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        else:
            return found, commit
        return None

    def _api(self, repo: str, rest: list[str]) -> None:
        revision = "/".join(rest[1:]) if rest[:1] in (["revision"], ["tree"]) else "main"
        if (found := self._commit_of(repo, revision)) is None:
            return
        repository, commit = found
        files = repository.at(commit)
        if rest[:1] == ["tree"]:
            listing = [
                {"type": "file", "path": path, "size": len(data), "oid": git_name(data)}
                | ({"lfs": {"oid": digest(data), "size": len(data), "pointerSize": 130}} if is_large(path) else {})
                for path, data in files.items()
            ]
            return self._json(200, listing)
        siblings = [{"rfilename": path} for path in files]
        information = {"_id": "1", "id": repo, "modelId": repo, "sha": commit, "siblings": siblings}
        access = {"private": repository.access == "private", "gated": "auto" if repository.access == "gated" else False}
        return self._json(200, information | access)

    def _resolve(self, repo: str, revision: str, path: str) -> None:
        if (found := self._commit_of(repo, revision)) is None:
            return
        repository, commit = found
        data = repository.at(commit).get(path)
        if data is None:
            return self._refuse(404, "EntryNotFound", "Entry not found")
        name = digest(data)
        headers = {"X-Repo-Commit": commit, "ETag": f'"{name}"'}
        if is_large(path) or self.command == "GET":
            headers |= {"X-Linked-Size": str(len(data)), "X-Linked-Etag": f'"{name}"'}
            # Under another name of this machine: the Hub's storage is another host, which no token may reach.
            headers |= {"Location": f"{self.hub.endpoint.replace('127.0.0.1', 'localhost')}/blob/{name}/{path}"}
            return self._send(302, b"", headers)
        return self._send(200, data, headers)

    def _blob(self, name: str) -> bytes:
        contents = (
            data for r in self.hub.repositories.values() for files in r.files.values() for data in files.values()
        )
        return next(data for data in contents if digest(data) == name)

    def _range(self, path: str, data: bytes) -> None:
        """The whole, or what a Range header asks of it."""
        asked = self.headers.get("Range", "")
        first, _, last = asked.removeprefix("bytes=").partition("-")
        start, end = int(first or 0), min(int(last or len(data) - 1), len(data) - 1)
        if self.command == "GET":
            self.hub.sent.append((path, end + 1 - start))
        if not asked:
            return self._send(200, data, {"Accept-Ranges": "bytes"})
        return self._send(206, data[start : end + 1], {"Content-Range": f"bytes {start}-{end}/{len(data)}"})

    def _body(self, path: str) -> bytes | None:
        """What the client sends; None where a fault ends the connection on the way."""
        cut = self.fault.cut if self.fault and self.command != "GET" else None
        body = b""
        for piece in self._pieces():
            body += piece
            if self.fault and self.fault.slow:
                time.sleep(self.fault.slow)
            if cut is not None and len(body) >= cut:
                self.hub.received.append((path, len(body)))
                self.close_connection = True
                self.connection.close()
                return None
        if self.command == "PUT":
            self.hub.received.append((path, len(body)))
        return body

    def _pieces(self) -> Iterator[bytes]:
        if self.headers.get("Transfer-Encoding") == "chunked":
            while length := int(self.rfile.readline(), 16):
                yield self.rfile.read(length)
                self.rfile.readline()
            self.rfile.readline()
            return
        left = int(self.headers.get("Content-Length") or 0)
        while left:
            piece = self.rfile.read(min(BLOCK, left))
            left -= len(piece)
            yield piece

    def _json(self, status: int, content: Any) -> None:
        self._send(status, json.dumps(content).encode(), kind="application/json")

    def _refuse(self, status: int, code: str, message: str) -> None:
        self._send(status, b"", {"X-Error-Code": code, "X-Error-Message": message})

    def _send(self, status: int, body: bytes, headers: dict[str, str] | None = None, *, kind: str = "") -> None:
        with suppress(BrokenPipeError, ConnectionResetError):  # the client gave up waiting
            self._write_answer(status, body, headers, kind)

    def _write_answer(self, status: int, body: bytes, headers: dict[str, str] | None, kind: str) -> None:
        self.send_response(status)
        for name, value in (headers or {}).items():
            self.send_header(name, value)
        self.send_header("Content-Type", kind or "application/octet-stream")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command == "HEAD":
            return
        if self.command == "GET" and self.fault and self.fault.cut is not None:
            body, self.close_connection = body[: self.fault.cut], True
        self.wfile.write(body)


def _with_body(answer: tuple[int, dict[str, str]]) -> tuple[int, bytes, dict[str, str]]:
    return answer[0], b"", answer[1]
