"""A question as the engines get it, and an answer as it comes back. No Ray, no torch."""

from __future__ import annotations

import secrets
from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from pydantic import ValidationError

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.config.recipe import explain
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError, brief
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import PromptRow, normalize_row
from mipo_ray.storage.rounds import Round

# What of the sampling a question may set; the rest is the run's.
SETTINGS = ("temperature", "top_p", "max_tokens")
SEEDS = 2**31  # engines take larger ones, but people copy these


@dataclass(frozen=True)
class Question:
    """What is asked, how it is sampled, and with which seed, the same for every policy. context: "" where nothing is
    known of the user."""

    text: str
    context: str
    sampling: SamplingConfig
    seed: int


@dataclass(frozen=True)
class Piece:
    """The next piece of an answer's text, as the engine decodes it."""

    round: Round
    text: str


@dataclass(frozen=True)
class Answer:
    """A whole answer. text: thoughts in it stand between <think> and </think>; token_ids: of all of it, with the end
    token where it stopped by itself; is_cut: at the length limit; copy_rate: see `text.statistics`.

    context_pmi: log p(answer | question, context) - log p(answer | question) by the initial model, nats per answer;
    None without a context, and where the answer leaves no room for it in the window.
    """

    round: Round
    text: str
    token_ids: tuple[int, ...]
    is_cut: bool
    copy_rate: float
    context_pmi: float | None = None

    def to_json(self) -> dict[str, Any]:
        """As `--json` and the page have it."""
        return {
            "round": self.round.key,
            "text": self.text,
            "token_ids": list(self.token_ids),
            "cut": self.is_cut,
            "copy_rate": self.copy_rate,
            "context_pmi_nats": self.context_pmi,
        }


class Answerer(Protocol):
    """Who answers: a run's engines (`engines.EngineAnswerer`)."""

    def ask(self, question: Question, rounds: Sequence[Round]) -> AsyncGenerator[Piece | Answer]:
        """The answers of these policies as they come: pieces of each, and, when all have ended, every whole answer.

        Policies that share an engine answer one after the other, in the order of `rounds`. Raises UserError for a
        question that cannot be asked, and where an engine is gone.
        """
        ...


async def collected(answerer: Answerer, question: Question, rounds: Sequence[Round]) -> list[Answer]:
    """The whole answers to a question, once all of them are there."""
    return [part async for part in answerer.ask(question, rounds) if isinstance(part, Answer)]


def sampling_of(config: Config, given: Mapping[str, Any], otherwise: SamplingConfig | None = None) -> SamplingConfig:
    """`otherwise` (None: the run's own sampling) with the settings (SETTINGS) that are given; raises UserError naming
    the one that is wrong."""
    for name in given:
        if name not in SETTINGS:
            raise UserError(f"{brief(name)}: unknown setting; expected {', '.join(SETTINGS)}")
    try:
        sampling = SamplingConfig.model_validate({**(otherwise or config.generation.sampling).model_dump(), **given})
    except ValidationError as error:
        raise UserError("; ".join(explain(item) for item in error.errors())) from None
    if sampling.min_tokens > sampling.max_tokens:
        raise UserError(
            f"max_tokens: expected at least {sampling.min_tokens} (the run's generation.sampling.min_tokens), found "
            f"{sampling.max_tokens}"
        )
    if sampling.max_tokens >= config.model.max_model_len:
        raise UserError(
            f"max_tokens: {sampling.max_tokens} leaves no room for a prompt in the run's model.max_model_len "
            f"({config.model.max_model_len})"
        )
    return sampling


def new_seed() -> int:
    """A seed for a question that names none."""
    return secrets.randbelow(SEEDS)


def prompt_row(question: Question, prompts: PromptsConfig) -> PromptRow:
    """The question as a row of the run's prompts: with its system message, its exemplars, and the context where
    `prompts.context_role` puts it. Raises UserError for a question or a context that cannot be one.

    A recipe's `question_template` makes questions of columns; here the question is what was typed.
    """
    typed = prompts.model_copy(update={"question_template": None, "loader": "rows"})
    values = {prompts.column: question.text, prompts.context_column: question.context}
    return normalize_row(SourceRow("the question", "question", values), typed)
