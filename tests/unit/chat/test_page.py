"""The page's server, with a fake of the engines: who may ask, what comes back, and what a vote leaves.

python -m pytest tests/unit/chat/test_page.py
"""

from __future__ import annotations

import http.client
import json
import re
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import pytest

from mipo_ray.chat.guard import MOST_BYTES, bound_socket
from mipo_ray.chat.page import MOST_WAITING, ChatPage
from mipo_ray.chat.policies import open_chat
from mipo_ray.chat.questions import sampling_of
from mipo_ray.chat.votes import VOTES, read_votes, shuffled
from mipo_ray.errors import UserError
from mipo_ray.storage.rounds import BASE, Round
from tests.helpers.chat_runs import make_chat_run, running_page
from tests.helpers.fake_answerer import FakeAnswerer, context_pmi

ANSWERS = {"base": "I do not know.", "0": "Perhaps a soup.", "1": "For a nurse: <b>a quick soup</b>."}
QUESTION = {"question": "What shall I cook?", "context": "I am a nurse.", "rounds": ["base", "1"]}


class Server:
    """A page that is served, and requests to it as a browser sends them, or not quite."""

    def __init__(self, page: ChatPage, answerer: FakeAnswerer, address: str) -> None:
        self.page, self.answerer = page, answerer
        parts = urlsplit(address)
        self.host, self.port, self.path = str(parts.hostname), int(parts.port or 0), parts.path

    def request(self, method: str, path: str, body: Any = None, **headers: str) -> http.client.HTTPResponse:
        connection = http.client.HTTPConnection(self.host, self.port, timeout=60)
        data = json.dumps(body) if isinstance(body, dict) else body
        given = {"Content-Type": "application/json"} if body is not None else {}
        connection.request(method, path, data, given | {name.replace("_", "-"): text for name, text in headers.items()})
        return connection.getresponse()

    def ask(self, **changes: Any) -> list[dict[str, Any]]:
        """The events of a question that is answered."""
        response = self.request("POST", f"{self.path}ask", QUESTION | changes)
        assert response.status == 200, response.read()
        return [json.loads(line) for line in response.read().splitlines()]

    def refused(self, path: str, body: Any) -> str:
        """What is said of a request that is wrong."""
        response = self.request("POST", f"{self.path}{path}", body)
        assert response.status == 400
        return str(json.loads(response.read())["message"])

    def vote(self, name: str, choice: int | None) -> dict[str, Any]:
        response = self.request("POST", f"{self.path}vote", {"id": name, "choice": choice})
        assert response.status == 200, response.read()
        return dict(json.loads(response.read()))


@pytest.fixture
def server(tmp_path: Path) -> Iterator[Server]:
    make_chat_run(tmp_path, 2)
    chat = open_chat(f"{tmp_path}/run", "base,0,1")
    answerer = FakeAnswerer(ANSWERS)
    page = ChatPage(chat, answerer, sampling_of(chat.config, {"temperature": 0.5}), "I am a nurse.")
    with running_page(page) as address:
        yield Server(page, answerer, address)


def test_the_page_and_what_it_needs_to_know(server: Server) -> None:
    html = server.request("GET", server.path)
    assert html.status == 200
    assert html.getheader("Content-Type") == "text/html; charset=utf-8"
    assert "mipo-ray: chat" in html.read().decode()
    known = json.loads(server.request("GET", f"{server.path}run").read())
    assert known["rounds"] == ["base", "0", "1"]
    assert known["sampling"] == {"temperature": 0.5, "top_p": 1.0, "max_tokens": 48}
    assert known["context"] == "I am a nurse."
    assert known["tally"]["votes"] == 0


def test_answers_come_piece_by_piece_and_then_with_their_figures(server: Server) -> None:
    events = server.ask(sampling={"temperature": 0, "max_tokens": 9}, seed=11)
    assert events[0] == {"event": "asked", "seed": 11, "places": 2, "rounds": ["base", "1"]}
    pieces = [event for event in events if event["event"] == "piece"]
    for place, key in enumerate(("base", "1")):
        assert "".join(event["text"] for event in pieces if event["place"] == place) == ANSWERS[key]
    assert len(pieces) > 6
    answers = [event for event in events if event["event"] == "answer"]
    assert [answer["round"] for answer in answers] == ["base", "1"]
    assert [answer["context_pmi_nats"] for answer in answers] == [context_pmi(BASE), context_pmi(Round(1))]
    assert (
        answers[0] | {"token_ids": [0, 1, 2, 3], "cut": True, "copy_rate": 0.125, "text": ANSWERS["base"]} == answers[0]
    )
    assert events[-1] == {"event": "done", "vote": None}
    question, rounds = server.answerer.asked[0]
    assert (question.text, question.context, question.seed) == ("What shall I cook?", "I am a nurse.", 11)
    assert (question.sampling.temperature, question.sampling.top_p, question.sampling.max_tokens) == (0.0, 1.0, 9)
    assert rounds == (BASE, Round(1))


def test_a_blind_question_tells_no_name_and_no_figure_before_the_vote(server: Server) -> None:
    seeds = set()
    for _ in range(12):  # the order changes, also where the seed of the sampling does not
        events = server.ask(blind=True, seed=5)
        assert events[0] == {"event": "asked", "seed": 5, "places": 2, "rounds": None}
        for event in events:
            assert event.keys() <= {"event", "seed", "places", "rounds", "place", "text", "vote"}
        texts = {event["place"]: event["text"] for event in events if event["event"] == "answer"}
        left = next(key for key, text in ANSWERS.items() if text == texts[0])
        told = server.vote(events[-1]["vote"], 0)
        assert told["answers"][0]["round"] == left
        assert [answer["text"] for answer in told["answers"]] == [texts[0], texts[1]]
        vote = read_votes(server.page.chat.run)[-1]
        assert vote.choice == left == vote.shown[0]
        assert [round.key for round in shuffled([BASE, Round(1)], vote.order_seed)] == list(vote.shown)
        seeds.add(vote.order_seed)
    votes = read_votes(server.page.chat.run)
    assert len(votes) == 12 == told["tally"]["votes"]
    assert len({vote.shown for vote in votes}) == 2
    assert votes[0].question == "What shall I cook?"
    assert votes[0].sampling["max_tokens"] == 48


def test_a_vote_counts_once_and_only_for_answers_that_were_shown(server: Server) -> None:
    name = server.ask(blind=True, rounds=["1", "0", "base"])[-1]["vote"]
    assert "choice: expected less than 3" in server.refused("vote", {"id": name, "choice": 3})
    assert server.vote(name, None)["tally"]["no_difference"] == 1
    assert "wait for no vote" in server.refused("vote", {"id": name, "choice": 0})
    assert "wait for no vote" in server.refused("vote", {"id": "another", "choice": 0})
    (vote,) = read_votes(server.page.chat.run)
    assert vote.choice is None
    assert sorted(vote.shown) == ["0", "1", "base"]
    # Of what nobody votes on not more than some is kept.
    names = [server.ask(blind=True)[-1]["vote"] for _ in range(MOST_WAITING + 1)]
    assert "wait for no vote" in server.refused("vote", {"id": names[0], "choice": 0})
    assert server.vote(names[1], 1)["tally"]["votes"] == 2


def test_a_vote_that_was_not_kept_can_be_given_again(server: Server) -> None:
    name = server.ask(blind=True)[-1]["vote"]
    place = Path(server.page.chat.run.path(VOTES))
    place.mkdir(parents=True)
    assert "votes.jsonl: the vote cannot be written" in server.refused("vote", {"id": name, "choice": 0})
    place.rmdir()
    assert server.vote(name, 0)["tally"]["votes"] == 1


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("{", "Invalid JSON"),
        ("[]", "object"),
        ({**QUESTION, "question": ""}, "question: "),
        ({**QUESTION, "question": 7}, "question: "),
        ({**QUESTION, "rounds": []}, "rounds: "),
        ({**QUESTION, "rounds": ["2"]}, "rounds: expected some of base, 0, 1, found 2"),
        ({**QUESTION, "sampling": {"temperature": -1}}, "temperature: "),
        ({**QUESTION, "sampling": {"max_tokens": 256}}, "max_tokens: 256 leaves no room"),
        ({**QUESTION, "sampling": {"max_tokens": 1.5}}, "max_tokens: "),
        ({**QUESTION, "sampling": {"seed": 1}}, "unknown setting; expected temperature, top_p, max_tokens"),
        ({**QUESTION, "seed": -1}, "seed: "),
        ({**QUESTION, "model": "other"}, "model: "),
    ],
)
def test_a_wrong_question_is_refused_before_anything_is_asked(server: Server, body: Any, said: str) -> None:
    assert said in server.refused("ask", body)
    assert server.answerer.asked == []


def test_what_goes_wrong_while_it_is_answered_is_an_event(server: Server) -> None:
    events = server.ask(question="refuse this", blind=True)
    assert [event["event"] for event in events] == ["asked", "error"]
    assert events[1]["message"] == "the question: 900 tokens do not fit"


def test_a_question_that_nobody_waits_for_is_given_up(server: Server) -> None:
    server.answerer.slow = 0.02
    server.answerer.answers = dict.fromkeys(ANSWERS, "word " * 500)
    response = server.request("POST", f"{server.path}ask", QUESTION)
    response.read(200)
    response.close()
    deadline = time.monotonic() + 60
    while not server.answerer.given_up:
        assert time.monotonic() < deadline
        time.sleep(0.02)


@pytest.mark.parametrize(
    "host", ["evil.example", "evil.example:{port}", "127.0.0.1", "127.0.0.1:1", "[::1]:{port}", ""]
)
def test_another_name_for_this_machine_is_refused(server: Server, host: str) -> None:
    """A page elsewhere may make its own name lead here; the browser then sends that name."""
    for path in (server.path, f"{server.path}run", "/"):
        assert server.request("GET", path, Host=host.format(port=server.port)).status == 421
    assert server.request("GET", f"{server.path}run", Host=f"localhost:{server.port}").status == 200


@pytest.mark.parametrize("path", ["/", "/run", "//run", "/{wrong}/", "/{wrong}/run", "/{short}/run", "/ü/run"])
def test_without_the_token_there_is_nothing(server: Server, path: str) -> None:
    token = server.path.strip("/")
    assert re.fullmatch(r"[0-9a-f]{64}", token)
    wrong = token[:-1] + ("0" if token[-1] != "0" else "1")
    response = server.request("GET", path.format(wrong=wrong, short=token[:-1]).replace("ü", "%C3%BC"))
    assert response.status == 404
    assert token not in response.read().decode() + str(response.headers)


def test_two_pages_have_two_tokens(server: Server) -> None:
    with running_page(server.page) as other:
        assert urlsplit(other).path != server.path


@pytest.mark.parametrize(
    ("headers", "status"),
    [
        ({"Origin": "https://evil.example"}, 403),
        ({"Origin": "null"}, 403),
        ({"Origin": "http://127.0.0.1:1"}, 403),
        ({"Content_Type": "text/plain"}, 415),
        ({"Content_Type": "application/x-www-form-urlencoded"}, 415),
        ({"Origin": "http://127.0.0.1:{port}"}, 200),
        ({}, 200),
    ],
)
def test_forms_and_pages_of_others_are_refused(server: Server, headers: dict[str, str], status: int) -> None:
    given = {name: text.format(port=server.port) for name, text in headers.items()}
    response = server.request("POST", f"{server.path}ask", QUESTION, **given)
    assert response.status == status
    response.read()
    assert len(server.answerer.asked) == (status == 200)


@pytest.mark.parametrize(
    ("method", "path"),
    [("GET", "ask"), ("PUT", "ask"), ("GET", "vote"), ("POST", "run"), ("DELETE", ""), ("OPTIONS", "ask")],
)
def test_other_methods_are_refused(server: Server, method: str, path: str) -> None:
    body = {} if method in ("POST", "PUT") else None
    response = server.request(method, f"{server.path}{path}", body)
    assert response.status == 405
    assert "Access-Control-Allow-Origin" not in response.headers


def test_a_request_that_is_too_long_is_refused(server: Server) -> None:
    long = QUESTION | {"context": "a" * MOST_BYTES}
    assert server.request("POST", f"{server.path}ask", long).status == 413
    assert server.answerer.asked == []


def test_every_answer_forbids_what_the_page_does_not_need(server: Server) -> None:
    responses = [
        server.request("GET", server.path),
        server.request("GET", "/"),
        server.request("POST", f"{server.path}ask", QUESTION),
        server.request("POST", f"{server.path}ask", "{"),
        server.request("GET", server.path, Host="evil.example"),
    ]
    for response in responses:
        policy = str(response.getheader("Content-Security-Policy"))
        assert policy.startswith("default-src 'none'; script-src 'sha256-")
        assert "unsafe" not in policy
        for directive in ("connect-src 'self'", "frame-ancestors 'none'", "form-action 'none'", "base-uri 'none'"):
            assert directive in policy
        assert response.getheader("Referrer-Policy") == "no-referrer"
        assert response.getheader("Cache-Control") == "no-store"
        assert response.getheader("X-Content-Type-Options") == "nosniff"
        assert "aiohttp" not in str(response.headers)
        assert response.getheader("Access-Control-Allow-Origin") is None
        assert response.getheader("Set-Cookie") is None


def test_the_page_names_nothing_outside_itself() -> None:
    text = (Path(__file__).parents[3] / "mipo_ray/chat/page.html").read_text()
    assert not re.search(r"https?:|//[a-z]|@import|url\(|<iframe|<object|innerHTML|eval\(|\son\w+=", text)
    assert re.findall(r'(?:src|href)="([^"]*)"', text) == ["data:,"]


def test_it_listens_on_this_machine_alone_and_tells_a_port_that_is_taken() -> None:
    with bound_socket(0) as found:
        host, port = found.getsockname()
        assert host == "127.0.0.1"
        found.listen()
        with pytest.raises(UserError, match=rf"--port {port}: expected a port of 127\.0\.0\.1 that is free"):
            bound_socket(port)
    assert found.family == socket.AF_INET
    for wrong in (-1, 65536):
        with pytest.raises(UserError, match=f"--port {wrong}"):
            bound_socket(wrong)
