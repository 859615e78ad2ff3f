"""The held-out mutual-information matrix: M answers, each scored under the conditionings of all M.

Two parts, each M x M sums of log-probs in nats, rows being answers (the first sample) and columns conditionings:

    prompts    log p(y_i | x_j): the answer of row i under the whole prompt of row j
    contexts   log p(y_i | q_i, c_j): the answer of row i under its own question with the context of user j

The diagonal is the answer under what it was sampled under. `mutual_information.pmi_matrix` takes each row's marginal
off. The rows are chosen from the first held-out ones, once, before the base is measured: all policies share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.config.prompts import ChatSettings, PromptsConfig
from mipo_ray.evaluation.held_out.conditionings import as_key, matrix_id
from mipo_ray.evaluation.held_out.rows import read_scores
from mipo_ray.generation.rendering import render_prompts
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.prompts.rows import PromptRow, with_context
from mipo_ray.storage.manifests import Matrices, Matrix
from mipo_ray.storage.records import read_record
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory

MATRIX_FILE = "matrix.json"
LOOKED_AT = 256
"""Among how many of the first held-out rows M different ones are looked for."""


@dataclass(frozen=True)
class MatrixMessages:
    """What a part of the matrix is made of, before it is rendered."""

    prompt_ids: list[str]
    """[M], of the rows and of the columns."""
    labels: list[str]
    """[M], what the conditionings say, for people."""
    messages: list[list[list[dict[str, str]]]]
    """[M][M], what the answer of each row is scored under, column by column."""


@dataclass(frozen=True)
class MatrixRows:
    """What MATRIX_FILE holds of a part."""

    prompt_ids: list[str]
    """[M], of the rows and of the columns."""
    labels: list[str]
    """[M], what the conditionings say, for people."""
    conditionings: list[list[list[int]]]
    """[M][M], the token ids that the answer of each row is scored under, column by column."""


def read_matrix_rows(run: RunDirectory, directory: str) -> dict[str, MatrixRows]:
    """The parts that MATRIX_FILE in the base's stage holds; {} where there is none. Raises RecordError for a damaged
    one."""
    name = f"{directory}/{MATRIX_FILE}"
    return read_record(dict[str, MatrixRows], run.read_text(name) or "{}", run.path(name))


def matrix_conditionings(rows: Sequence[PromptRow], prompts: PromptsConfig, size: int) -> dict[str, MatrixMessages]:
    """What the matrix is made of, by part.

    "prompts" has the first `size` rows with different texts, "contexts" those with different contexts. With fewer such
    rows a part is smaller, with fewer than 2 it is left out.
    """
    parts = {}
    asked = _first_different(rows, size, [row["text"] for row in rows])
    if len(asked) > 1:
        parts["prompts"] = MatrixMessages(
            [row["prompt_id"] for row in asked],
            [prompt_text(row["messages"], row["context"]) for row in asked],
            [[other["messages"] for other in asked] for _ in asked],
        )
    users = _first_different(rows, size, [as_key(row["context"]) for row in rows])
    if len(users) > 1:
        parts["contexts"] = MatrixMessages(
            [row["prompt_id"] for row in users],
            [user["context"] for user in users],
            [[with_context(row["question_messages"], user["context"], prompts) for user in users] for row in users],
        )
    return parts


def render_matrix(parts: dict[str, MatrixMessages], tokenizer: Any, chat: ChatSettings) -> dict[str, MatrixRows]:
    """The parts with token ids in the place of their messages."""
    return {
        name: MatrixRows(
            part.prompt_ids, part.labels, [render_prompts(tokenizer, of_answer, chat) for of_answer in part.messages]
        )
        for name, part in parts.items()
    }


def matrix_of(run: RunDirectory, round: Round, parts: dict[str, MatrixRows]) -> Matrices:
    """The scored matrix of one policy for its manifest. `parts` is MATRIX_FILE."""
    answers = read_scores(run, round)["answer"]

    def logprobs(part_name: str, judge: str) -> list[list[float]]:
        ids = parts[part_name].prompt_ids
        return [[answers[row, 0].logprobs[judge][matrix_id(part_name, column)] for column in ids] for row in ids]

    return {
        name: Matrix(
            prompt_ids=part.prompt_ids,
            labels=part.labels,
            initial=logprobs(name, "initial"),
            policy=None if round.is_base else logprobs(name, "policy"),
        )
        for name, part in parts.items()
    }


def _first_different(rows: Sequence[PromptRow], size: int, keys: Sequence[str]) -> list[PromptRow]:
    """The first `size` rows whose keys are neither empty nor those of an earlier row."""
    first: dict[str, PromptRow] = {}
    for row, key in zip(rows, keys, strict=True):
        if key and len(first) < size:
            first.setdefault(key, row)
    return list(first.values())
