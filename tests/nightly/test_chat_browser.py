"""The chat's page in a real browser (Chromium, headless), with a fake of the engines behind it.

python -m pytest tests/nightly/test_chat_browser.py
"""

from __future__ import annotations

import json
import re
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.chat.page import ChatPage
from mipo_ray.chat.policies import open_chat
from mipo_ray.chat.questions import sampling_of
from mipo_ray.chat.votes import read_votes
from tests.helpers.chat_runs import make_chat_run, running_page
from tests.helpers.chromium import CHROMIUM, Chromium
from tests.helpers.fake_answerer import FakeAnswerer
from tests.helpers.page_measures import MEASURE

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on the path (Debian: apt-get install chromium)")

ANSWERS = {
    "base": "It depends on what you like to eat, and on how much time you have.",
    "0": "Perhaps a soup with beans.",
    "1": "After a night shift: <b>a quick soup</b> & bread.\nIt keeps for two days.",
}


@pytest.fixture(scope="module")
def chromium(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Chromium]:
    with Chromium(tmp_path_factory.mktemp("chromium")) as browser:
        yield browser


@dataclass(frozen=True)
class OpenPage:
    """A page that is served, and the browser that has opened it."""

    browser: Chromium
    page: ChatPage
    answerer: FakeAnswerer
    address: str

    def visit(self, width: int = 1200, *, dark: bool = False) -> None:
        """Opens it; returns when it knows its run."""
        self.browser.visit(self.address, width, dark=dark)
        self.wait("document.querySelector('#rounds input')")

    def wait(self, condition: str) -> None:
        """Returns when a JavaScript expression is true."""
        deadline = time.monotonic() + 60
        while not self.browser.evaluate(f"Boolean({condition})"):
            assert time.monotonic() < deadline, f"{condition}\n{self.text()}"
            time.sleep(0.05)

    def text(self) -> str:
        return str(self.browser.evaluate("document.body.innerText"))

    def fill(self, **fields: str) -> None:
        for name, text in fields.items():
            self.browser.evaluate(f"document.getElementById('{name}').value = {json.dumps(text)}")

    def click(self, selector: str) -> None:
        self.browser.evaluate(f"document.querySelector({json.dumps(selector)}).click()")

    def ask(self, question: str, **fields: str) -> None:
        """Asks; returns when the answers are whole, or it failed."""
        self.fill(question=question, **fields)
        self.click("#ask")
        self.wait("document.getElementById('stop').disabled")

    def article(self, selector: str = "") -> list[str]:
        """The texts of what matches in the newest question's card."""
        return list(
            self.browser.evaluate(
                f"[...document.querySelectorAll('#asked article:first-child {selector}')].map((each) => each.innerText)"
            )
        )


@pytest.fixture
def opened(chromium: Chromium, tmp_path: Path) -> Iterator[OpenPage]:
    make_chat_run(tmp_path, 2)
    chat = open_chat(f"{tmp_path}/run", "base,0,1")
    answerer = FakeAnswerer(dict(ANSWERS))
    page = ChatPage(chat, answerer, sampling_of(chat.config, {"temperature": 0.5}), "I am a nurse.")
    with running_page(page) as address:
        opened = OpenPage(chromium, page, answerer, address)
        opened.visit()
        yield opened
        chromium.call("Page.navigate", url="about:blank")


def test_three_policies_answer_with_names_and_figures(opened: OpenPage) -> None:
    opened.ask("What shall I cook?", temperature="0", top_p="0.9", max_tokens="20", seed="11")
    assert opened.article("h3") == ["base", "round 0", "round 1"]
    assert opened.article(".text") == list(ANSWERS.values())  # as text, whatever it looks like
    assert opened.article(".figures") == [
        "15 tokens, cut at the limit; copy rate 0.125; context PMI \u22121.50 nats",
        "5 tokens; copy rate 0.125; context PMI +10.25 nats",
        "13 tokens; copy rate 0.125; context PMI +11.25 nats",
    ]
    assert opened.article(".question") == ["What shall I cook?"]
    assert opened.article(".settings-line") == ["temperature 0, top-p 0.9, at most 20 tokens, seed 11"]
    ((question, _),) = opened.answerer.asked
    assert (question.context, question.seed, question.sampling.temperature) == ("I am a nurse.", 11, 0)
    assert opened.browser.evaluate("document.querySelectorAll('#asked b').length") == 3  # the PMIs' alone
    opened.click("#rounds input[value='0']")
    opened.ask("And now?", context="")
    assert opened.article("h3") == ["base", "round 1"]
    assert "PMI" not in opened.article(".figures")[0]


def test_an_answer_is_shown_while_it_comes_and_can_be_stopped(opened: OpenPage) -> None:
    opened.answerer.slow = 0.5
    opened.answerer.answers["1"] = "word " * 500
    opened.fill(question="What shall I cook?")
    opened.click("#ask")
    opened.wait("document.querySelector('#asked .text') && /It depends/.test(document.body.innerText)")
    assert "like to eat, and on how much time" not in opened.text()
    assert opened.browser.evaluate("document.getElementById('ask').disabled")
    opened.click("#stop")
    opened.wait("document.getElementById('stop').disabled")
    assert opened.article(".error") == ["stopped"]
    deadline = time.monotonic() + 60
    while not opened.answerer.given_up:
        assert time.monotonic() < deadline
        time.sleep(0.05)


def test_a_blind_vote_names_the_policies_afterwards_and_is_counted(opened: OpenPage) -> None:
    opened.click("#rounds input[value='0']")
    opened.click("#blind")
    for number, choice in enumerate(("answer A is better", "answer B is better", "no difference")):
        opened.ask("What shall I cook?")
        assert opened.article("h3") == ["answer A", "answer B"]
        assert opened.article(".figures") == ["", ""]
        assert opened.article(".vote button") == ["answer A is better", "answer B is better", "no difference"]
        shown = opened.article(".text")
        place = opened.article(".vote button").index(choice) + 1
        opened.click(f"#asked article:first-child .vote button:nth-child({place})")
        opened.wait("!document.querySelector('#asked article:first-child .vote')")
        names = opened.article("h3")
        keys = [name.partition(":")[0].replace("round ", "") for name in names]
        assert [ANSWERS[key] for key in keys] == shown
        assert [name.endswith(": your choice") for name in names] == [place == 1, place == 2]
        assert all("context PMI" in line for line in opened.article(".figures"))
        vote = read_votes(opened.page.chat.run)[number]
        assert vote.choice == (None if place == 3 else keys[place - 1])
    rows = opened.browser.evaluate(
        "[...document.querySelectorAll('#counts tbody tr')].map((row) => [...row.cells].map((cell) => cell.innerText))"
    )
    assert [(policy, shown) for policy, _, shown in rows] == [("base", "3"), ("round 1", "3")]
    assert sum(int(chosen) for _, chosen, _ in rows) == 2
    assert "3 votes, 1 of them for no difference" in opened.text()
    opened.visit()  # whoever comes back finds them
    assert "3 votes, 1 of them for no difference" in opened.text()


def test_what_cannot_be_asked_is_told(opened: OpenPage) -> None:
    opened.ask("refuse this")
    assert opened.article(".error") == ["the question: 900 tokens do not fit"]
    opened.ask("What?", max_tokens="256")
    assert "max_tokens: 256 leaves no room for a prompt" in opened.text()
    opened.fill(max_tokens="20")
    for key in ANSWERS:
        opened.click(f"#rounds input[value='{key}']")
    opened.click("#ask")
    opened.wait("/choose a policy/.test(document.body.innerText)")
    assert len(opened.answerer.asked) == 1


def test_nothing_is_asked_of_a_network_and_nothing_foreign_runs(opened: OpenPage) -> None:
    opened.ask("What shall I cook?")
    asked = [event["params"]["request"]["url"] for event in opened.browser.events
             if event["method"] == "Network.requestWillBeSent"]  # fmt: skip
    assert {url.removeprefix(opened.address) for url in asked if url != "data:,"} == {"", "run", "ask"}
    logs = ("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")
    assert [event for event in opened.browser.events if event["method"] in logs] == []
    opened.browser.evaluate(
        "const made = document.createElement('script'); made.textContent = 'window.foreign = 1';"
        "document.body.append(made)"
    )
    assert opened.browser.evaluate("window.foreign === undefined")
    told = [event for event in opened.browser.events if event["method"] == "Log.entryAdded"]
    assert "Content Security Policy" in json.dumps(told)


@pytest.mark.parametrize("dark", [False, True])
@pytest.mark.parametrize("width", [390, 1200])
def test_everything_fits_and_can_be_read(opened: OpenPage, width: int, dark: bool) -> None:
    opened.visit(width, dark=dark)
    opened.ask("What shall I cook?")
    opened.ask("refuse this")
    opened.click("#blind")
    opened.ask("What shall I cook now?")
    measures: dict[str, Any] = opened.browser.evaluate(f"(() => {{{MEASURE}}})()")
    assert measures["inner"] == width
    assert measures["scroll"] <= measures["client"]
    for name in ("outside", "faint", "unnamed"):
        assert measures[name] == [], name
    brightness = sum(map(int, re.findall(r"\d+", measures["background"])[:3]))
    assert brightness < 150 if dark else brightness > 600
    unlabelled = opened.browser.evaluate(
        "[...document.querySelectorAll('input, textarea')].filter((each) => !each.labels.length).length"
    )
    assert unlabelled == 0
