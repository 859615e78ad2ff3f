"""The terminal: side by side, below each other, a conversation that is typed. With a fake of the engines.

python -m pytest tests/unit/chat/test_conversation.py
"""

from __future__ import annotations

import asyncio
import io
import itertools
import sys

import pytest
from rich.console import Console

from mipo_ray.chat.conversation import Conversation, Shown, figures, show, talk
from mipo_ray.chat.questions import Answer, Piece, Question
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.storage.rounds import BASE, Round
from tests.helpers.fake_answerer import FakeAnswerer

ROUNDS = (BASE, Round(1))
IDS = tuple(range(48))
LONG = "It depends on what you like to eat, and on how much time there is before your shift begins. [bold]Soup[/bold]."


def drawn(shown: Shown, width: int) -> str:
    console = Console(file=io.StringIO(), width=width, highlight=False, markup=False)
    console.print(shown.drawing(console.width))
    return str(console.file.getvalue())  # type: ignore[attr-defined]


def whole() -> Shown:
    shown = Shown(ROUNDS)
    shown.add(Answer(BASE, "I do not know.", IDS[:5], is_cut=False, copy_rate=0.0))
    shown.add(Answer(Round(1), LONG, IDS, is_cut=True, copy_rate=0.25, context_pmi=15.834))
    return shown


def test_two_answers_stand_side_by_side_where_there_is_room() -> None:
    lines = drawn(whole(), 100).splitlines()
    assert lines[0].split() == ["base", "round", "1"]
    assert lines[1].startswith("I do not know.  ")
    assert "It depends on what" in lines[1]
    right = lines[0].index("round 1")
    assert " ".join(line[right:].strip() for line in lines[1:-1]).startswith(LONG)
    assert max(map(len, lines)) <= 100


def test_and_below_each_other_where_there_is_not() -> None:
    lines = [line.rstrip() for line in drawn(whole(), 60).splitlines()]
    assert lines.index("base") < lines.index("I do not know.") < lines.index("round 1")
    assert any(line.startswith("It depends") for line in lines)


@pytest.mark.parametrize("width", [20, 60, 100])
def test_no_answer_moves_the_cursor_or_is_taken_for_markup(width: int) -> None:
    shown = Shown(ROUNDS)
    shown.add(Piece(BASE, "a\x1b[2J\x1b]0;title\x07b \u202e [red]c[/red]"))
    text = drawn(shown, width)
    assert "\x1b" not in text
    assert "\u202e" not in text
    joined = "".join(text.split())
    assert "a\\x1b[2J\\x1b]0;title\\x07b" in joined
    assert "[red]c[/red]" in joined


def test_pieces_add_up_until_the_whole_answer_takes_their_place() -> None:
    shown = Shown(ROUNDS)
    for text in ("On", "ce", " upon"):
        shown.add(Piece(BASE, text))
    assert "base\nOnce upon\n" in shown.lines()
    shown.add(Answer(BASE, "<think>Once</think> upon", IDS[:3], is_cut=False, copy_rate=0.0))
    assert "base\n<think>Once</think> upon\n3 tokens" in shown.lines()


def test_figures_name_what_they_are() -> None:
    assert figures(None) == ""
    assert figures(Answer(BASE, "x", IDS[:5], is_cut=False, copy_rate=0.0)) == "5 tokens; copy rate 0"
    answer = Answer(BASE, "x", IDS, is_cut=True, copy_rate=0.25, context_pmi=-1.5)
    assert figures(answer) == "48 tokens, cut at the limit; copy rate 0.250; context PMI -1.500 nats"


def test_what_is_no_terminal_gets_plain_lines_once(capsys: pytest.CaptureFixture[str]) -> None:
    answerer = FakeAnswerer({"base": "Nothing.", "1": "A soup\x1b[2J."})
    question = Question("What?", "I am a nurse.", SamplingConfig(), 3)
    answers = asyncio.run(show(answerer, question, ROUNDS, Console(file=io.StringIO(), force_terminal=False)))
    assert [answer.round for answer in answers] == list(ROUNDS)
    assert capsys.readouterr().out == (
        "base\nNothing.\n1 tokens, cut at the limit; copy rate 0.125; context PMI -1.500 nats\n\n"
        "round 1\nA soup\\x1b[2J.\n2 tokens; copy rate 0.125; context PMI +11.25 nats\n"
    )


def test_a_terminal_shows_answers_while_they_come() -> None:
    answerer = FakeAnswerer({"base": "one two three four", "1": "five six seven eight"}, slow=0.3)
    screen = io.StringIO()
    question = Question("What?", "", SamplingConfig(), 3)
    asyncio.run(show(answerer, question, ROUNDS, Console(file=screen, force_terminal=True, width=100)))
    text = screen.getvalue()
    assert "one two" in text.partition("three")[0]
    assert text.rindex("one two three four") < text.rindex("4 tokens")


@pytest.fixture
def typed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Lines that somebody types, and then the end of the input."""
    lines: list[str] = []

    def read(prompt: str = "") -> str:
        if not lines:
            raise EOFError
        return lines.pop(0)

    monkeypatch.setattr("builtins.input", read)
    monkeypatch.setattr(sys, "__stdout__", io.StringIO())
    return lines


def test_a_conversation_goes_on_until_the_end_of_the_input(
    typed: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    typed += ["What?", "", "/context I am a nurse. ", "refuse this", " And now? ", "/context", "Then?"]
    answerer = FakeAnswerer({"base": "Nothing.", "1": "A soup."})
    conversation = Conversation(ROUNDS, SamplingConfig(), "", itertools.count(7).__next__)
    talk(answerer, conversation, asyncio.run)
    asked = [(question.text, question.context, question.seed) for question, _ in answerer.asked]
    assert asked == [
        ("What?", "", 7),
        ("refuse this", "I am a nurse.", 8),
        ("And now?", "I am a nurse.", 9),
        ("Then?", "", 10),
    ]
    output = capsys.readouterr()
    assert output.out.count("A soup.") == 3
    assert "error: the question: 900 tokens do not fit" in output.err
