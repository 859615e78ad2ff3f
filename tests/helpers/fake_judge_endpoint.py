"""A fake OpenAI-compatible server: a judge that says what a test wants it to say, and the faults that servers have."""

from __future__ import annotations

import contextlib
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "fake-judge"


def always_first(_: str) -> str:
    return "The first one.\nVerdict: A"


def garbage(prompt: str) -> str:
    return f"As a language model I like both of them {len(prompt)} times."


def longer(prompt: str) -> str:
    """Prefers the longer answer, whatever its place; rates an answer by its length."""
    if "BEGIN ANSWER A " not in prompt:  # a boundary may begin with an A, too
        return f"**Rating:** {1 + len(shown(prompt, 'ANSWER')) % 5}"
    first, second = (len(shown(prompt, f"ANSWER {letter}")) for letter in "AB")
    return f"Well.\n\nVerdict: {'A' if first > second else 'B' if second > first else 'tie'}"


def shown(prompt: str, part: str) -> str:
    """What stands between the BEGIN and the END line of a part."""
    found = re.search(rf"^BEGIN {part} (\w+)$\n(.*)\nEND {part} \1$", prompt, re.DOTALL | re.MULTILINE)
    assert found is not None, prompt
    return found[2]


class FakeJudgeEndpoint:
    """The server. `say` makes the judgement of a prompt.

    statuses: HTTP statuses that the first attempts at each prompt get, one after the other, before it is judged; -1: no
    answer at all until the server closes; fault: what it says with such a status. key: requests with another one get
    401; None: any will do. limit: the one name of the length limit that it takes, others get HTTP 400; content: what an
    answer's content is made of its text; both may be set before a test asks.
    """

    def __init__(
        self,
        say: Callable[[str], str],
        statuses: tuple[int, ...] = (),
        key: str | None = None,
        fault: str = "injected fault",
    ) -> None:
        self.say = say
        self.statuses = statuses
        self.key = key
        self.fault = fault
        self.limit: str | None = None
        self.content: Callable[[str], Any] = str
        self.judged: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self.refusal = "Unsupported parameter: '{0}' is not supported with this model. Use '{1}' instead."
        self.attempts: Counter[str] = Counter()
        self.closing = threading.Event()
        self._lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint._get(self)

            def do_POST(self) -> None:
                endpoint._post(self)

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._server.server_port}/v1"

    @contextlib.contextmanager
    def running(self) -> Iterator[FakeJudgeEndpoint]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            self.closing.set()
            self._server.shutdown()
            self._server.server_close()
            thread.join()

    def _get(self, handler: BaseHTTPRequestHandler) -> None:
        if self._is_allowed(handler):
            _send(handler, 200, {"object": "list", "data": [{"id": MODEL, "object": "model", "created": 0}]})

    def _post(self, handler: BaseHTTPRequestHandler) -> None:
        request = json.loads(handler.rfile.read(int(handler.headers["Content-Length"])))
        if not self._is_allowed(handler):
            return
        wrong = {"max_tokens", "max_completion_tokens"} & request.keys() - {self.limit}
        if self.limit is not None and wrong:
            self.refused.append(request)
            _send(handler, 400, {"error": {"message": self.refusal.format(*wrong, self.limit)}})
            return
        prompt = request["messages"][-1]["content"]
        name = hashlib.sha256(prompt.encode()).hexdigest()
        with self._lock:
            attempt = self.attempts[name]
            self.attempts[name] += 1
        status = self.statuses[attempt] if attempt < len(self.statuses) else 200
        if status == -1:
            self.closing.wait()
            return
        if status != 200:
            _send(handler, status, {"error": {"message": f"{self.fault} {status}"}})
            return
        with self._lock:
            self.judged.append(request)
        choice = {
            "index": 0,
            "finish_reason": "stop",
            "message": {"role": "assistant", "content": self.content(self.say(prompt))},
        }
        usage = {"prompt_tokens": 1, "completion_tokens": 7, "total_tokens": 8}
        answer = {"id": name, "object": "chat.completion", "created": 0, "model": MODEL}
        _send(handler, 200, {**answer, "choices": [choice], "usage": usage})

    def _is_allowed(self, handler: BaseHTTPRequestHandler) -> bool:
        given = handler.headers.get("Authorization", "")
        if self.key is None or given == f"Bearer {self.key}":
            return True
        _send(handler, 401, {"error": {"message": f"wrong key: {given}"}})
        return False


def _send(handler: BaseHTTPRequestHandler, status: int, content: dict[str, Any]) -> None:
    body = json.dumps(content).encode()
    handler.send_response(status)
    handler.send_header("Content-Type", "application/json")
    handler.send_header("Content-Length", str(len(body)))
    if status == 429:
        handler.send_header("Retry-After", "0")
    handler.end_headers()
    with contextlib.suppress(BrokenPipeError, ConnectionResetError):
        handler.wfile.write(body)
