"""A fault injector: an HTTP proxy on loopback between a client and a server, which spoils answers by a plan.

It stands before moto's S3 server or a stand-in for the Hub. What it does to each request is decided by a `Plan`, by
counting or by a seed, so that a failure can be repeated.
"""

from __future__ import annotations

import contextlib
import http.client
import random
import socket
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Literal

Fault = Literal[
    "unavailable",  # 503, which S3 says when it cannot serve
    "slow_down",  # 503 with the code by which S3 asks for fewer requests
    "internal",  # 500
    "too_many",  # 429, of the Hub
    "denied",  # 403, a permission that was taken away
    "skewed",  # 403, as S3 answers a client whose clock is off
    "cut_answer",  # the connection ends in the middle of the answer's body
    "cut_request",  # the connection ends before the request is served
    "lost_answer",  # the request is served, and the connection ends before the answer
    "stall",  # no answer for `stall_seconds`, then the connection ends
]
ERRORS: dict[str, tuple[int, str]] = {
    "unavailable": (503, "ServiceUnavailable"),
    "slow_down": (503, "SlowDown"),
    "internal": (500, "InternalError"),
    "too_many": (429, "TooManyRequests"),
    "denied": (403, "AccessDenied"),
    "skewed": (403, "RequestTimeTooSkewed"),
}


@dataclass(frozen=True)
class Request:
    """What a plan decides by. number: how many requests came before it."""

    method: str
    path: str
    number: int


Plan = Callable[[Request], Fault | None]


def no_faults(_: Request) -> None:
    """The plan of a healthy server."""
    return None


def first(count: int, fault: Fault, method: str = "", path: str = "") -> Plan:
    """Spoils the first `count` requests of a method ("": any) whose path holds `path`."""
    left = [count]

    def plan(request: Request) -> Fault | None:
        if method not in ("", request.method) or path not in request.path or left[0] == 0:
            return None
        left[0] -= 1
        return fault

    return plan


def always(fault: Fault, method: str = "", path: str = "") -> Plan:
    """Spoils every request of a method ("": any) whose path holds `path`."""
    return lambda request: fault if method in ("", request.method) and path in request.path else None


def seeded(seed: int, share: float, faults: Sequence[Fault]) -> Plan:
    """Spoils a share of all requests, each by one of `faults`, drawn from a seed and the request's number."""

    def plan(request: Request) -> Fault | None:
        draw = random.Random(seed * 1_000_003 + request.number)
        return draw.choice(faults) if draw.random() < share else None

    return plan


@dataclass
class FaultyProxy:
    """Passes requests on to the server at `port` of this machine, spoilt by `plan`."""

    port: int
    plan: Plan = no_faults
    stall_seconds: float = 30.0
    injected: list[tuple[Fault, str, str]] = field(default_factory=list)
    """Every fault so far, with the method and the path of its request."""
    requests: list[Request] = field(default_factory=list)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        """The proxy's URL, while it runs."""
        self._ending = threading.Event()
        proxy, lock = self, threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def _handle(self) -> None:
                with lock:
                    request = Request(self.command, self.path, len(proxy.requests))
                    proxy.requests.append(request)
                    fault = proxy.plan(request)
                    if fault is not None:
                        proxy.injected.append((fault, request.method, request.path))
                proxy._serve(self, fault)

            do_GET = do_HEAD = do_PUT = do_POST = do_DELETE = _handle

            def log_message(self, *_: Any) -> None:
                pass

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        server.daemon_threads = True
        threading.Thread(target=server.serve_forever, daemon=True, name="faulty-proxy").start()
        try:
            yield f"http://127.0.0.1:{server.server_address[1]}"
        finally:
            self._ending.set()
            server.shutdown()
            server.server_close()

    def _serve(self, client: BaseHTTPRequestHandler, fault: Fault | None) -> None:
        if fault == "cut_request":
            return _cut(client)
        body = _body(client)
        if fault in ERRORS:
            return _refuse(client, *ERRORS[fault])
        if fault == "stall":
            self._ending.wait(self.stall_seconds)
            return _cut(client)
        server = http.client.HTTPConnection("127.0.0.1", self.port)
        try:
            headers = {name: value for name, value in client.headers.items() if name.lower() != "transfer-encoding"}
            server.request(client.command, client.path, body, headers)
            answer = server.getresponse()
            content = answer.read()
        finally:
            server.close()
        if fault == "lost_answer":
            return _cut(client)
        client.send_response_only(answer.status, answer.reason)
        for name, value in answer.getheaders():
            if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                client.send_header(name, value)
        length = answer.headers["Content-Length"] if client.command == "HEAD" else str(len(content))
        if length is not None:
            client.send_header("Content-Length", length)
        client.end_headers()
        client.wfile.write(content[: len(content) // 2] if fault == "cut_answer" else content)
        if fault == "cut_answer":
            _cut(client)


def _body(client: BaseHTTPRequestHandler) -> bytes:
    if client.headers.get("Transfer-Encoding", "").lower() != "chunked":
        return client.rfile.read(int(client.headers.get("Content-Length", 0)))
    found = b""
    while size := int(client.rfile.readline().split(b";")[0], 16):
        found += client.rfile.read(size)
        client.rfile.readline()
    client.rfile.readline()
    return found


def _refuse(client: BaseHTTPRequestHandler, status: int, code: str) -> None:
    content = f"<?xml version='1.0'?><Error><Code>{code}</Code><Message>injected</Message></Error>".encode()
    client.send_response_only(status)
    client.send_header("Content-Type", "application/xml")
    client.send_header("Content-Length", str(len(content)))
    client.end_headers()
    if client.command != "HEAD":
        client.wfile.write(content)


def _cut(client: BaseHTTPRequestHandler) -> None:
    client.close_connection = True
    with contextlib.suppress(OSError):
        client.wfile.flush()
        client.connection.shutdown(socket.SHUT_RDWR)
