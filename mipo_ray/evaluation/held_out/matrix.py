"""The held-out mutual-information matrix: M answers, each scored under the conditionings of all M.

Two parts, each M x M sums of log-probs in nats, rows being answers (the first sample) and columns conditionings:

    prompts    log p(y_i | x_j): the answer of row i under the whole prompt of row j
    contexts   log p(y_i | q_i, c_j): the answer of row i under its own question with the context of user j

The diagonal is the answer under what it was sampled under. `mutual_information.pmi_matrix` takes each row's marginal
off. The rows are chosen from the first held-out ones, once, before the base is measured: all policies share them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipo_ray.config.prompts import ChatSettings, PromptsConfig
from mipo_ray.evaluation.held_out.conditionings import as_key, matrix_id
from mipo_ray.evaluation.held_out.rows import read_scores
from mipo_ray.generation.rendering import render_prompts
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.prompts.rows import PromptRow, with_context
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory

MATRIX_FILE = "matrix.json"
LOOKED_AT = 256
"""Among how many of the first held-out rows M different ones are looked for."""


def matrix_conditionings(rows: Sequence[PromptRow], prompts: PromptsConfig, size: int) -> dict[str, dict[str, Any]]:
    """What the matrix is made of: part -> {prompt_ids [M], labels [M], messages [M][M]}.

    "prompts" has the first `size` rows with different texts, "contexts" those with different contexts; labels are
    what the conditionings say, for people. With fewer such rows a part is smaller, with fewer than 2 it is left out.
    """
    parts = {}
    asked = _first_different(rows, size, [row["text"] for row in rows])
    if len(asked) > 1:
        parts["prompts"] = _part(
            asked,
            [prompt_text(row["messages"], row["context"]) for row in asked],
            [[other["messages"] for other in asked] for _ in asked],
        )
    users = _first_different(rows, size, [as_key(row["context"]) for row in rows])
    if len(users) > 1:
        parts["contexts"] = _part(
            users,
            [user["context"] for user in users],
            [[with_context(row["question_messages"], user["context"], prompts) for user in users] for row in users],
        )
    return parts


def render_matrix(parts: dict[str, dict[str, Any]], tokenizer: Any, chat: ChatSettings) -> dict[str, dict[str, Any]]:
    """The parts with `conditionings` [M][M], token ids, in the place of their messages."""
    return {
        kind: {
            **{name: value for name, value in part.items() if name != "messages"},
            "conditionings": [render_prompts(tokenizer, of_answer, chat) for of_answer in part["messages"]],
        }
        for kind, part in parts.items()
    }


def matrix_of(run: RunDirectory, round: Round, parts: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """The scored matrix of one policy for its manifest: part -> {prompt_ids, labels, initial [M][M], policy [M][M]}.

    Sums of log-probs, nats, by the frozen initial model and, for a round, by the policy itself. `parts` is MATRIX_FILE.
    """
    answers = read_scores(run, round)["answer"]
    judges = ["initial"] if round.is_base else ["initial", "policy"]
    matrix = {}
    for part_name, part in parts.items():
        prompt_ids = part["prompt_ids"]
        matrix[part_name] = {
            "prompt_ids": prompt_ids,
            "labels": part["labels"],
            **{
                judge: [
                    [answers[prompt_id, 0].logprobs[judge][matrix_id(part_name, column)] for column in prompt_ids]
                    for prompt_id in prompt_ids
                ]
                for judge in judges
            },
        }
    return matrix


def _first_different(rows: Sequence[PromptRow], size: int, keys: Sequence[str]) -> list[PromptRow]:
    """The first `size` rows whose keys are neither empty nor those of an earlier row."""
    first: dict[str, PromptRow] = {}
    for row, key in zip(rows, keys, strict=True):
        if key and len(first) < size:
            first.setdefault(key, row)
    return list(first.values())


def _part(rows: Sequence[PromptRow], labels: list[str], messages: list[list[list[dict[str, str]]]]) -> dict[str, Any]:
    return {"prompt_ids": [row["prompt_id"] for row in rows], "labels": labels, "messages": messages}
