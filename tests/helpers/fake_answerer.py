"""A fake of a run's engines for tests of the chat: it answers by itself, word by word, and counts what it was asked."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncGenerator, Sequence

from mipo_ray.chat.questions import Answer, Piece, Question
from mipo_ray.errors import UserError
from mipo_ray.storage.rounds import Round


class FakeAnswerer:
    """Answers `answers[key of the policy]`, each `context_pmi` by itself where there is a context.

    refuses: a question with this text is a UserError. slow: seconds before each word. asked: every question, with the
    policies in the order in which they were asked; given_up: how many questions somebody did not wait for.
    """

    def __init__(self, answers: dict[str, str], slow: float = 0.0, refuses: str = "refuse this") -> None:
        self.answers = answers
        self.slow = slow
        self.refuses = refuses
        self.asked: list[tuple[Question, tuple[Round, ...]]] = []
        self.given_up = 0

    async def ask(self, question: Question, rounds: Sequence[Round]) -> AsyncGenerator[Piece | Answer]:
        """See `questions.Answerer`."""
        self.asked.append((question, tuple(rounds)))
        if question.text == self.refuses:
            raise UserError("the question: 900 tokens do not fit")
        try:
            words = {round: self.answers[round.key].split(" ") for round in rounds}
            for number in range(max(map(len, words.values()))):
                await asyncio.sleep(self.slow)
                for round, of_round in words.items():
                    if number < len(of_round):
                        yield Piece(round, " " * (number > 0) + of_round[number])
        except GeneratorExit:
            self.given_up += 1
            raise
        for round in rounds:
            text = self.answers[round.key]
            pmi = context_pmi(round) if question.context else None
            yield Answer(
                round, text, tuple(range(len(text.split(" ")))), is_cut=round.is_base, copy_rate=0.125, context_pmi=pmi
            )


def context_pmi(round: Round) -> float:
    """What the fake calls the PMI of a policy's answers, nats."""
    return -1.5 if round.is_base else 10.25 + round.number
