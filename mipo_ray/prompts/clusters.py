"""Whose row a held-out prompt is, and what it asks: what intervals resample, as short hashes. Pure."""

from __future__ import annotations

import hashlib
import json
from typing import Any

from mipo_ray.prompts.rows import PromptRow


def user_of(row: PromptRow | dict[str, Any]) -> str:
    """Equal for the rows of one user: of one group or, where a row has none, with the same context but for white
    space; "" for a row that has neither."""
    if row["group"]:
        return _hash(["group", row["group"]])
    context = " ".join(row["context"].split())
    return _hash(["context", context]) if context else ""


def question_of(row: PromptRow | dict[str, Any]) -> str:
    """Equal for the rows that ask the same, the context apart and but for white space."""
    return _hash([[message["role"], " ".join(message["content"].split())] for message in row["question_messages"]])


class ClusterCounts:
    """Counts the users and questions of rows that go by."""

    def __init__(self) -> None:
        self._users: set[str] = set()
        self._questions: set[str] = set()
        self._unnamed = 0

    def watch(self, _: str, row: PromptRow) -> None:
        """Looks at a row; see `check.Watch`."""
        user = user_of(row)
        self._unnamed += not user
        if user:
            self._users.add(user)
        self._questions.add(question_of(row))

    @property
    def users(self) -> int | None:
        """A row that names nobody is a user of its own; None where no row names one."""
        return len(self._users) + self._unnamed if self._users else None

    @property
    def questions(self) -> int:
        return len(self._questions)


def _hash(value: Any) -> str:
    return hashlib.blake2b(json.dumps(value).encode(), digest_size=8).hexdigest()
