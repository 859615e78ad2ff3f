"""The client of an OpenAI-compatible judge, against a fake server on this machine; no Ray.

python -m pytest tests/unit/judge/test_endpoint.py
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pyarrow as pa
import pytest
from pydantic import SecretStr

from mipo_ray.config.judge import JudgeConfig
from mipo_ray.errors import UserError
from mipo_ray.judge.endpoint import EndpointJudge, check_endpoint, endpoint_key
from tests.helpers.fake_judge_endpoint import MODEL, FakeJudgeEndpoint, always_first, garbage

KEY = "sk-of-this-test-1234567890"


class FakeEvents:
    """Keeps the events, where the run's writer would write them."""

    def __init__(self) -> None:
        self.emitted: list[dict[str, Any]] = []

    def emit(self, event: dict[str, Any]) -> None:
        self.emitted.append(event)

    def tell(self, event: dict[str, Any]) -> None:
        """Counts that nobody watches."""


class AnotherServer:
    """Answers every request with HTTP 200 and the same body; keeps the headers that it was sent, as text."""

    def __init__(self, kind: str, body: str) -> None:
        self.headers = headers = list[str]()

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                headers.append(str(self.headers))
                self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self.send_response(200)
                self.send_header("Content-Type", kind)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body.encode())

            do_POST = do_GET

            def log_message(self, *_: Any) -> None: ...

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)

    @contextlib.contextmanager
    def running(self) -> Iterator[str]:
        thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        thread.start()
        try:
            yield f"http://127.0.0.1:{self._server.server_port}/v1"
        finally:
            self._server.shutdown()
            self._server.server_close()
            thread.join()


def config(endpoint: FakeJudgeEndpoint, **more: Any) -> JudgeConfig:
    return JudgeConfig(model=MODEL, endpoint=endpoint.url, **more)


def judged(judge: JudgeConfig, prompts: list[str], events: Any = None, key: str = "none") -> list[dict[str, Any]]:
    async def run() -> pa.Table:
        actor = EndpointJudge(judge, SecretStr(key), events or FakeEvents())
        block = pa.table({"prompt_id": [f"p{index}" for index in range(len(prompts))], "prompt": prompts})
        (table,) = [part async for part in actor(block)]
        return table

    return asyncio.run(run()).to_pylist()


def test_every_row_is_judged_in_its_place() -> None:
    events = FakeEvents()
    with FakeJudgeEndpoint(garbage).running() as endpoint:
        prompts = ["x" * index for index in range(1, 30)]
        rows = judged(config(endpoint, max_concurrent_requests=3), prompts, events)
    assert [row["judgement"] for row in rows] == [garbage(prompt) for prompt in prompts]
    assert {(row["finish_reason"], row["tokens"]) for row in rows} == {("stop", 7)}
    assert {request["max_tokens"] for request in endpoint.judged} == {512}
    assert {request["model"] for request in endpoint.judged} == {MODEL}
    (event,) = events.emitted
    assert (event["event"], event["rows"], event["generated_tokens"]) == ("generated", 29, 203)


def test_a_request_is_sent_again_after_faults() -> None:
    with FakeJudgeEndpoint(always_first, statuses=(503, 429)).running() as endpoint:
        rows = judged(config(endpoint), ["one", "two"])
        assert sorted(endpoint.attempts.values()) == [3, 3]
    assert {row["judgement"] for row in rows} == {always_first("")}


@pytest.mark.parametrize(
    ("status", "retries", "expected", "attempts"),
    [
        (500, 1, r"prompt 'p0': .*injected fault 500.* \(sent again 1 times\)\. Judgements made so far are kept", 2),
        (429, 2, r"injected fault 429.* \(sent again 2 times\)", 3),
        (400, 5, r"injected fault 400\. Judgements made so far are kept", 1),
        (404, 5, "injected fault 404", 1),
    ],
)
def test_a_server_that_goes_on_refusing_is_named(status: int, retries: int, expected: str, attempts: int) -> None:
    with FakeJudgeEndpoint(always_first, statuses=(status,) * 20).running() as endpoint:
        with pytest.raises(UserError, match=rf"^evaluate\.judge\.endpoint {endpoint.url}, prompt 'p0': ") as error:
            judged(config(endpoint, max_retries=retries), ["one"])
        assert list(endpoint.attempts.values()) == [attempts]
    assert re.search(expected, str(error.value)), error.value


def test_a_server_that_never_answers_is_given_up() -> None:
    with (
        FakeJudgeEndpoint(always_first, statuses=(-1,) * 20).running() as endpoint,
        pytest.raises(UserError, match=r"no answer within 0\.5 seconds"),
    ):
        judged(config(endpoint, max_retries=0, timeout_seconds=0.5), ["one"])


def test_the_key_comes_from_the_environment_and_stays_there(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with FakeJudgeEndpoint(always_first, key=KEY).running() as endpoint:
        judge = config(endpoint, api_key_variable="JUDGE_KEY")
        with pytest.raises(UserError, match="refuses the key in the environment variable JUDGE_KEY"):
            check_endpoint(judge)
        monkeypatch.setenv("JUDGE_KEY", "sk-of-somebody-else")
        with pytest.raises(UserError) as error:
            judged(judge, ["one"], key=endpoint_key(judge).get_secret_value())
        assert "sk-of" not in str(error.value)
        monkeypatch.setenv("JUDGE_KEY", KEY)
        check_endpoint(judge)
        assert KEY not in repr(endpoint_key(judge))
        assert len(judged(judge, ["one"], key=endpoint_key(judge).get_secret_value())) == 1


def test_nothing_else_of_the_environment_is_sent(monkeypatch: pytest.MonkeyPatch) -> None:
    planted = {"ORG_ID": "planted-1", "PROJECT_ID": "planted-2", "CUSTOM_HEADERS": "X-Mine: planted-3"}
    for name, value in planted.items():
        monkeypatch.setenv(f"OPENAI_{name}", value)
    server = AnotherServer("application/json", '{"object": "list", "data": []}')
    with server.running() as url:
        judge = JudgeConfig(model=MODEL, endpoint=url)
        check_endpoint(judge)
        judged(judge, ["one"])
    assert len(server.headers) == 2
    assert "planted" not in "".join(server.headers)
    assert {name: os.environ[f"OPENAI_{name}"] for name in planted} == planted


def test_a_key_is_read_without_what_stands_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", f" {KEY}\r\n")
    with FakeJudgeEndpoint(always_first, key=KEY).running() as endpoint:
        judge = config(endpoint, api_key_variable="JUDGE_KEY")
        assert endpoint_key(judge).get_secret_value() == KEY
        check_endpoint(judge)
        monkeypatch.setenv("JUDGE_KEY", "\n")
        assert endpoint_key(judge).get_secret_value() == "none"


@pytest.mark.parametrize("wrong", ["sk-\u00e4bc", "sk-abc\ndef", "sk-abc\x7f"])
def test_a_key_that_no_header_can_hold_is_refused_by_the_name_of_its_variable(
    monkeypatch: pytest.MonkeyPatch, wrong: str
) -> None:
    monkeypatch.setenv("JUDGE_KEY", wrong)
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        judge = config(endpoint, api_key_variable="JUDGE_KEY")
        with pytest.raises(UserError) as error:
            check_endpoint(judge)
    assert str(error.value).startswith("environment variable JUDGE_KEY: expected the key of evaluate.judge.endpoint")
    assert "sk-" not in str(error.value)
    assert "abc" not in str(error.value)


def test_a_server_that_repeats_the_key_does_not_get_it_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", KEY)
    with FakeJudgeEndpoint(always_first, statuses=(400,), fault=f"no quota for Bearer {KEY}").running() as endpoint:
        judge = config(endpoint, api_key_variable="JUDGE_KEY")
        with pytest.raises(UserError, match=r"no quota for Bearer \(the key in JUDGE_KEY\)") as error:
            judged(judge, ["one"], key=KEY)
    assert KEY not in str(error.value)


@pytest.mark.parametrize(
    ("kind", "body"),
    [
        ("text/html", "<html><body>Welcome</body></html>"),
        ("application/json", "<html>"),
        ("application/json", '["a", "b"]'),
        ("application/json", '{"choices": 3, "data": 3}'),
    ],
)
def test_a_server_of_another_kind_is_named(kind: str, body: str) -> None:
    with AnotherServer(kind, body).running() as url:
        judge = JudgeConfig(model=MODEL, endpoint=url)
        expected = rf"^evaluate\.judge\.endpoint {url}.*: expected an OpenAI-compatible API, found "
        with pytest.raises(UserError, match=expected):
            check_endpoint(judge)
        with pytest.raises(UserError, match=expected) as error:
            judged(judge, ["one"])
    assert "prompt 'p0'" in str(error.value)
    assert KEY not in str(error.value)


def test_a_server_that_answers_without_choices_is_taken_for_a_judge_that_says_nothing() -> None:
    with AnotherServer("application/json", '{"choices": [], "data": []}').running() as url:
        judge = JudgeConfig(model=MODEL, endpoint=url)
        check_endpoint(judge)
        assert judged(judge, ["one"])[0]["judgement"] == ""


def test_a_model_that_is_not_served_is_refused_with_those_that_are() -> None:
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        check_endpoint(config(endpoint))
        other = JudgeConfig(model="nobody", endpoint=endpoint.url)
        with pytest.raises(UserError, match=rf"serves {MODEL}; found 'nobody'"):
            check_endpoint(other)
    with pytest.raises(UserError, match=rf"^evaluate\.judge\.endpoint {endpoint.url}: cannot be reached"):
        check_endpoint(config(endpoint, max_retries=0))


@pytest.mark.parametrize(
    "refusal",
    [
        "Unsupported parameter: '{0}' is not supported with this model. Use '{1}' instead.",
        "body.{0}: Extra inputs are not permitted",
        "{0}: unknown field",
        "Unrecognized request argument supplied: {0}",
    ],
)
def test_a_server_that_takes_another_name_of_the_limit_is_asked_by_that_name(refusal: str) -> None:
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        endpoint.limit, endpoint.refusal = "max_completion_tokens", refusal
        rows = judged(config(endpoint, max_tokens=77, max_concurrent_requests=1), [f"prompt {n}" for n in range(5)])
    assert {row["judgement"] for row in rows} == {always_first("")}
    assert {request.get("max_completion_tokens") for request in endpoint.judged} == {77}
    assert not any("max_tokens" in request for request in endpoint.judged)
    assert len(endpoint.refused) == 1  # the first one; then it is known


def test_a_server_that_refuses_both_names_is_named() -> None:
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        endpoint.limit = "tokens"
        with pytest.raises(UserError, match="'max_completion_tokens' is not supported with this model"):
            judged(config(endpoint), ["one"])
        assert len(endpoint.refused) == 2


def test_a_limit_that_is_too_large_is_no_unknown_name() -> None:
    fault = "max_tokens is too large: 512. This model's context length is 256, status"
    with FakeJudgeEndpoint(always_first, statuses=(400,), fault=fault).running() as endpoint:
        with pytest.raises(UserError, match="max_tokens is too large"):
            judged(config(endpoint), ["one"])
        assert list(endpoint.attempts.values()) == [1]


@pytest.mark.parametrize(
    ("parts", "expected"),
    [
        (lambda text: [{"type": "text", "text": text}], "Verdict: A"),
        (lambda text: [{"type": "text", "text": text[:5]}, {"type": "output_text", "text": text[5:]}], "Verdict: A"),
        (lambda text: [{"type": "thinking", "thinking": "B?"}, {"type": "text", "text": text}], "Verdict: A"),
        (lambda text: [text], "Verdict: A"),
        (lambda text: [], ""),
        (lambda text: None, ""),
    ],
)
def test_answers_in_parts_are_joined(parts: Any, expected: str) -> None:
    with FakeJudgeEndpoint(lambda _: "Verdict: A").running() as endpoint:
        endpoint.content = parts
        (row,) = judged(config(endpoint), ["one"])
    assert row["judgement"] == expected


@pytest.mark.parametrize(
    ("content", "found"),
    [
        ([{"type": "image_url", "image_url": {"url": "x"}}], "expected parts of text, found one of type 'image_url'"),
        ([{"type": "text", "text": "A"}, {"type": "audio"}], "found one of type 'audio'"),
        ([{"type": "text", "text": 4}], "found one of type 'text'"),
        ([7], "found one of type 'int'"),
        ({"verdict": "A"}, "expected text or a list of parts, found dict"),
        (4, "expected text or a list of parts, found int"),
    ],
)
def test_answers_that_are_no_text_are_refused_by_name(content: Any, found: str) -> None:
    with FakeJudgeEndpoint(always_first).running() as endpoint:
        endpoint.content = lambda _: content
        with pytest.raises(UserError, match=re.escape(found)) as error:
            judged(config(endpoint), ["one"])
    assert f"evaluate.judge.endpoint {endpoint.url}, prompt 'p0': its answer: " in str(error.value)
