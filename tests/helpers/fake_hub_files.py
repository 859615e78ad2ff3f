"""A stand-in for the Hugging Face Hub that serves one repository of files to be downloaded, on loopback.

It speaks what huggingface_hub 2.4 asks: the commit of a revision, the tree of a commit, and its files.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "c0ffee" + 34 * "1"
NAME = "org/model"


@contextlib.contextmanager
def serve_repository(files: dict[str, bytes]) -> Iterator[int]:
    """The port of a Hub with `files` in the repository `NAME`, whose main branch is at `COMMIT`."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            path = unquote(urlsplit(self.path).path)
            if path.startswith(f"/api/models/{NAME}/tree/{COMMIT}"):
                self._send([_entry(name, content) for name, content in files.items()])
            elif path in (f"/api/models/{NAME}", f"/api/models/{NAME}/revision/main"):
                self._send({"id": NAME, "sha": COMMIT, "siblings": [{"rfilename": name} for name in files]})
            elif (name := path.removeprefix(f"/{NAME}/resolve/{COMMIT}/")) in files:
                self._send(files[name], {"X-Repo-Commit": COMMIT, "ETag": f'"{_hash(files[name])}"'})
            else:
                self.send_error(404)

        do_HEAD = do_GET

        def _send(self, found: Any, headers: dict[str, str] | None = None) -> None:
            content = found if isinstance(found, bytes) else json.dumps(found).encode()
            self.send_response(200)
            for name, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
                self.send_header(name, value)
            self.end_headers()
            if self.command != "HEAD":
                self.wfile.write(content)

        def log_message(self, *_: Any) -> None:
            """Nothing: pytest shows what a test prints."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield int(server.server_address[1])
    finally:
        server.shutdown()
        server.server_close()


def _entry(name: str, content: bytes) -> dict[str, Any]:
    return {"type": "file", "path": name, "size": len(content), "oid": _hash(content)}


def _hash(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()
