"""Blind votes: which answer somebody preferred without knowing whose it was. One line each in chat/votes.jsonl."""

from __future__ import annotations

import contextlib
import json
import os
import posixpath
import secrets
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from mipo_ray.errors import UserError
from mipo_ray.storage.records import read_record, to_json
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory, StorageError

VOTES = "chat/votes.jsonl"


@dataclass(frozen=True, kw_only=True)
class Vote:
    """One line of chat/votes.jsonl."""

    time: str
    """When it was given, UTC."""
    question: str
    context: str
    """What was known of the user; "" where nothing was."""
    shown: tuple[str, ...]
    """The policies (base, 0, 1, ...) in the order in which their answers stood on the page."""
    order_seed: int
    """What that order was drawn with (`shuffled`)."""
    choice: str | None
    """The policy whose answer was chosen; null: no difference."""
    answers: tuple[str, ...]
    """The texts, in the order of `shown`."""
    seed: int
    """Of the sampling, the same for every policy."""
    sampling: dict[str, float]
    """temperature, top_p, top_k, max_tokens, min_tokens."""


@dataclass(frozen=True)
class Tally:
    """What votes add up to. chosen and shown: by policy, how often its answer was chosen, of how often it was shown."""

    votes: int
    no_difference: int
    chosen: dict[str, int]
    shown: dict[str, int]

    def to_json(self) -> dict[str, Any]:
        """As the page gets it."""
        policies = [
            {"round": key, "chosen": self.chosen.get(key, 0), "shown": count} for key, count in self.shown.items()
        ]
        return {"votes": self.votes, "no_difference": self.no_difference, "policies": policies}


def shuffled(rounds: Sequence[Round], order_seed: int) -> list[Round]:
    """The policies in the order that a seed draws, every order as likely as another."""
    return [rounds[place] for place in np.random.default_rng(order_seed).permutation(len(rounds))]


def new_order_seed() -> int:
    """A seed that nobody can foresee: one that followed from the question's would show the same order again."""
    return secrets.randbits(32)


def keep_vote(run: RunDirectory, vote: Vote) -> None:
    """Adds a vote to the run's, on a line of its own also where a kill cut the last one off.

    On a local disk it is one write at the end of the file; an object store cannot append, and gets all of it anew.
    Raises StorageError where it cannot be written.
    """
    line = json.dumps(to_json(vote), ensure_ascii=False) + "\n"
    if not run.is_local:
        before = run.read_text(VOTES) or ""
        run.write_text(VOTES, f"{_ended(before)}{line}")
        return
    path = run.path(VOTES)
    try:
        os.makedirs(posixpath.dirname(path), exist_ok=True)
        # For its owner alone, as are the questions of a run, and no link is followed.
        place = os.open(path, os.O_RDWR | os.O_APPEND | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        with os.fdopen(place, "r+b", buffering=0) as file:
            size = file.seek(0, os.SEEK_END)
            is_cut = size > 0 and os.pread(file.fileno(), 1, size - 1) != b"\n"
            file.write(("\n" * is_cut + line).encode("utf-8"))
            os.fsync(file.fileno())
    except OSError as error:
        raise StorageError(f"{path}: the vote cannot be written: {error}") from error


def read_votes(run: RunDirectory) -> list[Vote]:
    """Every vote of a run; a line that a kill cut off is left out. Raises StorageError, naming file and line, for one
    that is complete and no vote."""
    votes = []
    for number, line in enumerate((run.read_text(VOTES) or "").split("\n"), start=1):
        if not line.strip() or not _is_json(line):
            continue
        try:
            votes.append(read_record(Vote, line, f"{run.path(VOTES)}, line {number}"))
        except UserError as error:
            raise StorageError(f"{error}. Mend or remove that line.") from None
    return votes


def tally(votes: Iterable[Vote]) -> Tally:
    """The counts of votes; policies in the order of the rounds."""
    votes = list(votes)
    chosen: dict[str, int] = {}
    shown: dict[str, int] = {}
    for vote in votes:
        for key in vote.shown:
            shown[key] = shown.get(key, 0) + 1
        if vote.choice is not None:
            chosen[vote.choice] = chosen.get(vote.choice, 0) + 1
    in_order = sorted(shown, key=lambda key: (key != "base", len(key), key))
    return Tally(len(votes), sum(vote.choice is None for vote in votes), chosen, {key: shown[key] for key in in_order})


def _ended(text: str) -> str:
    return text if not text or text.endswith("\n") else f"{text}\n"


def _is_json(line: str) -> bool:
    with contextlib.suppress(ValueError, RecursionError):
        json.loads(line)
        return True
    return False
