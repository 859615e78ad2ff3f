"""A stand-in for the Hugging Face Hub's API: makes repositories and takes commits, for tests that publish.

It speaks what huggingface_hub 2.4 sends: `repos/create`, `preupload`, Git LFS's batch and basic transfer, `commit`. Xet
transfers are left out: a test sets HF_HUB_DISABLE_XET.
"""

from __future__ import annotations

import base64
import contextlib
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

TOKEN = "hf_" + "oftheteststhatpublish"
COMMIT = "c0ffee" + 34 * "0"


@dataclass
class FakeRepository:
    """What the stand-in holds of a repository. commits: the messages, in order."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)
    commits: list[str] = field(default_factory=list)


@dataclass
class FakeHubApi:
    """The repositories by name, and what was asked: (method, path)."""

    repositories: dict[str, FakeRepository] = field(default_factory=dict)
    asked: list[tuple[str, str]] = field(default_factory=list)
    url: str = ""
    _large: dict[str, bytes] = field(default_factory=dict)

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeHubApi]:
        server = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self))
        self.url = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def environment(self) -> dict[str, str]:
        """For a process that is to publish here."""
        return {
            "HF_ENDPOINT": self.url,
            "HF_TOKEN": TOKEN,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
        }

    def answer(self, method: str, path: str, body: bytes) -> tuple[int, Any]:
        """Status and JSON for a request."""
        self.asked.append((method, path))
        if method == "PUT" and (found := re.fullmatch(r"/lfs/(\w{64})", path)):
            self._large[found[1]] = body
            return (200, {}) if hashlib.sha256(body).hexdigest() == found[1] else (400, {"error": "another hash"})
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        found = re.fullmatch(
            r"/(?:api/models/)?(?P<name>[^/]+/[^/]+?)(?:/revision/main)?(?P<rest>(?:\.git)?/.+)?", path
        )
        name = found["name"] if found else ""
        if name not in self.repositories:
            return 404, {"error": "Repository not found"}
        rest = found["rest"] if found and found["rest"] else ""
        repository = self.repositories[name]
        if method == "GET" and not rest:
            return 200, {"id": name, "private": repository.private, "sha": COMMIT, "siblings": []}
        if rest == "/preupload/main":
            asked = json.loads(body)["files"]
            return 200, {"files": [self._mode(one["path"]) for one in asked]}
        if rest == ".git/info/lfs/objects/batch":
            objects = json.loads(body)["objects"]
            return 200, {"transfer": "basic", "objects": [self._place(one) for one in objects]}
        if rest == "/commit/main":
            return self._commit(repository, name, body)
        return 404, {"error": f"{method} {path}: not in this stand-in"}

    def _create(self, wanted: dict[str, Any]) -> tuple[int, Any]:
        name = f"{wanted['organization']}/{wanted['name']}"
        url = f"{self.url}/{name}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": url}
        # Left out, a repository is public: that is what must not happen by chance.
        private = wanted.get("private") is True or wanted.get("visibility") == "private"
        self.repositories[name] = FakeRepository(private)
        return 200, {"url": url, "name": name}

    def _mode(self, path: str) -> dict[str, Any]:
        is_large = path.endswith(".safetensors")
        return {"path": path, "uploadMode": "lfs" if is_large else "regular", "shouldIgnore": False, "oid": None}

    def _place(self, wanted: dict[str, Any]) -> dict[str, Any]:
        return {**wanted, "actions": {"upload": {"href": f"{self.url}/lfs/{wanted['oid']}"}}}

    def _commit(self, repository: FakeRepository, name: str, body: bytes) -> tuple[int, Any]:
        for line in map(json.loads, body.decode().splitlines()):
            value = line["value"]
            if line["key"] == "header":
                repository.commits.append(value["summary"])
            elif line["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                repository.files[value["path"]] = self._large[value["oid"]]
        return 200, {"success": True, "commitOid": COMMIT, "commitUrl": f"{self.url}/{name}/commit/{COMMIT}"}


def _handler(hub: FakeHubApi) -> type[BaseHTTPRequestHandler]:
    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            path = unquote(urlsplit(self.path).path)
            if not path.startswith("/lfs/") and self.headers.get("Authorization") != f"Bearer {TOKEN}":
                status, found = 401, {"error": "Invalid username or password."}
            else:
                status, found = hub.answer(self.command, path, body)
            content = json.dumps(found).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("Content-Type", "application/json")
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest shows what a test prints."""

    return Handler
