"""The writing half of the small Hub: repositories, branches, commits, collections, LFS uploads whole or in parts.

The answers have the form that huggingface_hub reads (its ``hf_api``, ``_commit_api`` and ``lfs``).
"""

from __future__ import annotations

import base64
import json
from typing import Any

import yaml
from hub_state import ATTRIBUTES, Hub, Repository, digest, git_name, is_large

Answer = tuple[int, Any]


class Writing:
    """Requests that change something; each gives a status and the content of its answer."""

    hub: Hub

    def post(self, parts: list[str], body: bytes, query: dict[str, list[str]]) -> Answer:
        """Answer a POST by somebody who is logged in."""
        match parts:
            case ["api", "repos", "create"]:
                return self._create(json.loads(body))
            case ["api", "models", owner, name, "preupload", *_]:
                return self._preupload(f"{owner}/{name}", "/".join(parts[5:]), json.loads(body))
            case ["api", "models", owner, name, "commit", *_]:
                lines = [json.loads(line) for line in body.splitlines()]
                return self._commit(f"{owner}/{name}", "/".join(parts[5:]), lines, "create_pr" in query)
            case ["api", "models", owner, name, "branch", *_]:
                return self._branch(f"{owner}/{name}", "/".join(parts[5:]))
            case [owner, name, "info", "lfs", "objects", "batch"]:
                return self._batch(json.loads(body))
            case ["lfs", oid, "complete"]:
                return self._complete(oid, json.loads(body))
            case ["lfs", oid, "verify"]:
                self.hub.verified.add(oid)
                return 200, {}
            case ["api", "collections"]:
                return self._collection(json.loads(body))
            case ["api", "collections", owner, slug, "items"]:
                return self._item(f"{owner}/{slug}", json.loads(body))
            case _:
                return 404, {"error": "no such endpoint"}

    def put(self, parts: list[str], body: bytes) -> tuple[int, dict[str, str]]:
        """Store an object, or a part of one; status and headers of the answer."""
        _, oid, *part = parts
        if part:
            self.hub.pieces[oid, int(part[0])] = body
        elif digest(body) != oid:
            return 400, {}
        else:
            self.hub.objects[oid] = body
        return 200, {"ETag": f'"{digest(body)}"'}

    def validate(self, body: bytes) -> Answer:
        """The Hub's own look at a card; no login is needed."""
        text, errors = json.loads(body)["content"], []
        try:
            metadata = yaml.safe_load(text.split("---")[1]) if text.startswith("---") else None
        except yaml.YAMLError as error:
            metadata, errors = {}, [str(error)]
        bases = (metadata or {}).get("base_model") or []
        for base in [bases] if isinstance(bases, str) else bases:
            if base.count("/") > 1 or base.startswith("/"):
                errors.append(f'"base_model" with value "{base}" is not valid. Use a model id from the Hub.')
        warnings = [] if metadata else [{"message": "empty or missing yaml metadata in repo card"}]
        return (400 if errors else 200), {"errors": [{"message": e} for e in errors], "warnings": warnings}

    def _create(self, asked: dict) -> Answer:
        repo = f"{asked.get('organization') or 'me'}/{asked['name']}"
        url = f"{self.hub.endpoint}/{repo}"
        if self.hub.readonly or repo.startswith("closed/"):
            return 403, {
                "error": f"You don't have the rights to create a model under the namespace {repo.split('/')[0]}"
            }
        if repo in self.hub.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        access = "private" if asked.get("visibility") == "private" else "public"
        self.hub.repositories[repo] = Repository({"main": {".gitattributes": ATTRIBUTES}}, access=access)
        return 200, {"url": url}

    def _branch(self, repo: str, branch: str) -> Answer:
        files = self.hub.repositories[repo].files
        if branch in files:
            return 409, {"error": "Reference already exists"}
        files[branch] = dict(files["main"])
        return 200, {}

    def _preupload(self, repo: str, revision: str, asked: dict) -> Answer:
        if self.hub.readonly:
            return 403, {"error": "this token may only read"}
        there = self.hub.repositories[repo].files[revision]

        def mode(path: str) -> dict[str, Any]:
            data, large = there.get(path), is_large(path)
            oid = None if data is None else digest(data) if large else git_name(data)
            return {"path": path, "uploadMode": "lfs" if large else "regular", "shouldIgnore": False, "oid": oid}

        return 200, {"files": [mode(file["path"]) for file in asked["files"]]}

    def _batch(self, asked: dict) -> Answer:
        def instructions(oid: str, size: int) -> dict[str, Any]:
            if oid in self.hub.objects:
                return {"oid": oid, "size": size}
            at = f"{self.hub.endpoint}/lfs/{oid}"
            upload: dict[str, Any] = {"href": at, "header": {}}
            if size > self.hub.chunk:
                count = -(-size // self.hub.chunk)
                parts = {str(i): f"{at}/{i}" for i in range(1, count + 1)}
                upload = {"href": f"{at}/complete", "header": {"chunk_size": str(self.hub.chunk), **parts}}
            return {"oid": oid, "size": size, "actions": {"upload": upload, "verify": {"href": f"{at}/verify"}}}

        return 200, {"transfer": "basic", "objects": [instructions(o["oid"], o["size"]) for o in asked["objects"]]}

    def _complete(self, oid: str, asked: dict) -> Answer:
        pieces = [self.hub.pieces.get((oid, part["partNumber"]), b"") for part in asked["parts"]]
        tags = [f'"{digest(piece)}"' for piece in pieces]
        if digest(b"".join(pieces)) != oid or tags != [part["etag"] for part in asked["parts"]]:
            return 400, {"error": "the parts are not the object"}
        self.hub.objects[oid] = b"".join(pieces)
        return 200, {}

    def _commit(self, repo: str, revision: str, lines: list[dict], pull_request: bool) -> Answer:
        repository = self.hub.repositories[repo]
        header, *operations = [(line["key"], line["value"]) for line in lines]
        parent = header[1].get("parentCommit")
        if self.hub.readonly and not pull_request:
            return 403, {"error": "this token may only read"}
        if parent is not None and parent != repository.commit(revision):
            return 412, {"error": "A commit has happened since. Please refresh and try again."}
        files = dict(repository.files[revision])
        for key, value in operations:
            path = value["path"]
            if key == "file":
                files[path] = base64.b64decode(value["content"])
            elif key == "lfsFile" and value["oid"] in self.hub.verified:
                files[path] = self.hub.objects[value["oid"]]
            elif key == "lfsFile" and self.hub.xet is not None:
                files[path] = f"in Xet: {value['oid']}".encode()
            elif key == "deletedFile" and path in files:
                del files[path]
            else:
                return 400, {"error": f"{key} {path}: not uploaded, or not there"}
        target = f"refs/pr/{1 + sum(name.startswith('refs/pr/') for name in repository.files)}"
        target = target if pull_request else revision
        repository.files[target] = files
        self.hub.commits.append(
            {"repo": repo, "summary": header[1]["summary"], "paths": [v["path"] for _, v in operations]}
        )
        oid, page = repository.commit(target), f"{self.hub.endpoint}/{repo}"
        discussion = f"{page}/discussions/{target.rpartition('/')[2]}" if pull_request else None
        return 200, {"commitOid": oid, "commitUrl": f"{page}/commit/{oid}", "pullRequestUrl": discussion}

    def _collection(self, asked: dict) -> Answer:
        slug = f"{asked['namespace']}/{asked['title'].lower().replace(' ', '-')}-0123456789abcdef01234567"
        status = 409 if slug in self.hub.collections else 200
        self.hub.collections.setdefault(slug, [])
        return status, self.described(slug)

    def _item(self, slug: str, asked: dict) -> Answer:
        if slug not in self.hub.collections:
            return 404, {"error": "Collection not found"}
        if asked["item"]["id"] in self.hub.collections[slug]:
            return 409, {"error": "already in the collection"}
        self.hub.collections[slug].append(asked["item"]["id"])
        return 200, self.described(slug)

    def described(self, slug: str) -> dict[str, Any]:
        """A collection, without its items."""
        start = "2026-01-01T00:00:00.000Z"
        fields = {"slug": slug, "title": slug, "owner": {}, "items": [], "lastUpdated": start, "position": 0}
        return {**fields, "private": False, "theme": "green", "upvotes": 0}
