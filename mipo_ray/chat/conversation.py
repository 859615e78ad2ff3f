"""Talking in the terminal: answers side by side as they come, where it is wide enough, else one below the other."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import dataclass, replace
from typing import Any

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.table import Table
from rich.text import Text

from mipo_ray.chat.questions import Answer, Answerer, Piece, Question
from mipo_ray.config.generation import SamplingConfig
from mipo_ray.errors import UserError
from mipo_ray.measures import format_value
from mipo_ray.storage.rounds import Round
from mipo_ray.terminal import plain, say, say_error

COLUMN = 40  # characters that an answer needs beside another one
CONTEXT = "/context"
HELP = f"Ask a question; {CONTEXT} TEXT says who asks, {CONTEXT} alone that nothing is known of them; Ctrl-D ends."


@dataclass(frozen=True)
class Conversation:
    """What holds for every question until it is changed. seeds: makes the seed of the next question."""

    rounds: Sequence[Round]
    sampling: SamplingConfig
    context: str
    seeds: Callable[[], int]

    def question(self, text: str) -> Question:
        """The next question."""
        return Question(text, self.context, self.sampling, self.seeds())


class Shown:
    """The answers to one question as far as they have come, as text or to be drawn."""

    def __init__(self, rounds: Sequence[Round]) -> None:
        self._texts = dict.fromkeys(rounds, "")
        self.answers: dict[Round, Answer] = {}

    def add(self, part: Piece | Answer) -> None:
        """Takes the next piece, or a whole answer, whose text stands in place of its pieces."""
        if isinstance(part, Piece):
            self._texts[part.round] += part.text
        else:
            self._texts[part.round] = part.text
            self.answers[part.round] = part

    def drawing(self, width: int) -> RenderableType:
        """Side by side where each answer has COLUMN characters of the width, else one below the other."""
        parts = [
            Text.assemble(
                (title(round), "bold"), "\n", plain(text), "\n", (figures(self.answers.get(round)), "dim"), "\n"
            )
            for round, text in self._texts.items()
        ]
        if width < COLUMN * len(parts):
            return Group(*parts)
        table = Table.grid(expand=True, padding=(0, 3))
        for _ in parts:
            table.add_column(ratio=1)
        table.add_row(*parts)
        return table

    def lines(self) -> str:
        """One below the other, for what is no terminal."""
        shown = (f"{title(key)}\n{text}\n{figures(self.answers.get(key))}\n" for key, text in self._texts.items())
        return "\n".join(shown).rstrip("\n")


def title(round: Round) -> str:
    """How an answer is headed."""
    return round.label.strip()


def figures(answer: Answer | None) -> str:
    """What stands below an answer: its length, what it copies, its PMI. "" while it is not whole."""
    if answer is None:
        return ""
    found = [f"{len(answer.token_ids)} tokens{', cut at the limit' if answer.is_cut else ''}"]
    found.append(f"copy rate {format_value(answer.copy_rate, 'share')}")
    if answer.context_pmi is not None:
        found.append(f"context PMI {format_value(answer.context_pmi, 'nats', signed=True)} nats")
    return "; ".join(found)


async def show(answerer: Answerer, question: Question, rounds: Sequence[Round], console: Console) -> list[Answer]:
    """Asks one question and shows the answers, in a terminal while they come; returns them."""
    shown = Shown(rounds)
    with contextlib.ExitStack() as stack:
        live: Live | None = None
        if console.is_terminal:
            # Drawn by a library's cursor movements, past the guard of the streams: every text was made plain.
            live = stack.enter_context(Live(console=console, redirect_stdout=False, redirect_stderr=False))
        async for part in answerer.ask(question, rounds):
            shown.add(part)
            if live is not None:
                live.update(shown.drawing(console.width))
    if not console.is_terminal:
        say(shown.lines())
    return list(shown.answers.values())


def talk(answerer: Answerer, conversation: Conversation, run: Callable[[Coroutine[Any, Any, Any]], Any]) -> None:
    """Asks what is typed, line by line, until the end of the input. run: a coroutine to its end (asyncio.Runner)."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401  (input() then takes arrow keys and remembers lines)
    console = terminal()
    asked = sys.stdin.isatty()
    if asked:
        say(HELP)
    while True:
        try:
            text = input("> " if asked else "").strip()
        except EOFError:
            return
        word, _, rest = text.partition(" ")
        if word == CONTEXT:
            conversation = replace(conversation, context=rest.strip())
        elif text:
            try:
                run(show(answerer, conversation.question(text), conversation.rounds, console))
            except UserError as error:  # of this question; the next one may be asked all the same
                say_error(f"error: {error}")
            say()


def terminal() -> Console:
    """Standard output, past the guard of the streams; what is drawn on it must be made plain before."""
    return Console(file=sys.__stdout__, highlight=False, markup=False, emoji=False)
