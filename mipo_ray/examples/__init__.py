"""Example prompts written for this project, and the program that crosses its users with its questions.

The hand-written files are `users.jsonl` and `questions.jsonl`, each divided into train, dev and test, and the two
instruction files. `python -m mipo_ray.examples` writes the personalization files from the first two.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from math import lcm
from pathlib import Path

from mipo_ray.errors import UserError

EXAMPLES_DIRECTORY = Path(__file__).parent
INGREDIENTS = ("questions", "users")


@dataclass(frozen=True)
class Crossing:
    """One personalization file: which users meet which questions, in how many rows."""

    name: str
    split: str
    rows: int


CROSSINGS = (
    Crossing("personalization", split="train", rows=320),
    Crossing("personalization_dev", split="dev", rows=48),
    Crossing("personalization_heldout", split="test", rows=60),
)


def bundled_path(name: str) -> Path:
    """The file behind `bundled:NAME`.

    Raises UserError, with the names there are, for a name that is not a bundled prompt file.
    """
    names = sorted(path.stem for path in EXAMPLES_DIRECTORY.glob("*.jsonl") if path.stem not in INGREDIENTS)
    if name not in names:
        raise UserError(f"bundled:{name}: no such bundled prompt file; expected one of {', '.join(names)}")
    return EXAMPLES_DIRECTORY / f"{name}.jsonl"


def cross(users: list[dict[str, str]], questions: list[dict[str, str]], crossing: Crossing) -> Iterator[dict[str, str]]:
    """Yields prompt rows: row k joins user k mod U and question k mod Q of the split.

    No pair comes twice in the first lcm(U, Q) rows, successive rows share neither user nor question, and in the first
    n rows, for every n, the numbers of rows of two users (or two questions) differ by at most one.
    """
    users = [user for user in users if user["split"] == crossing.split]
    questions = [question for question in questions if question["split"] == crossing.split]
    available = lcm(len(users), len(questions))
    if crossing.rows > available:
        raise ValueError(f"{crossing.name}: {crossing.rows} rows asked for, but only {available} pairs are distinct")
    return islice(_pairs(users, questions, crossing.split), crossing.rows)


def _pairs(users: list[dict[str, str]], questions: list[dict[str, str]], split: str) -> Iterator[dict[str, str]]:
    for k in range(lcm(len(users), len(questions))):
        user, question = users[k % len(users)], questions[k % len(questions)]
        user_number = user["user_id"].rsplit("-", 1)[-1]
        question_number = question["question_id"].rsplit("-", 1)[-1]
        yield {
            "prompt_id": f"{split}-{user_number}-{question_number}",
            "prompt": question["question"],
            "context": user["context"],
            "group": user["user_id"],
        }
