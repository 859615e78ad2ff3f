"""A round, or the base before the first one: its key, its label and its directory, spelt in one place."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, order=True)
class Round:
    """A round by its number, from 0; BASE, with the number -1, is what stands before round 0."""

    number: int

    @property
    def is_base(self) -> bool:
        return self.number < 0

    @property
    def index(self) -> int | None:
        """As events and manifests have it: null for the base."""
        return None if self.is_base else self.number

    @property
    def key(self) -> str:
        """As results.json, evaluation.json and metrics have it: "base", "0", "1", ..."""
        return "base" if self.is_base else str(self.number)

    @property
    def label(self) -> str:
        """As lines for people begin with it, 7 characters wide."""
        return "base   " if self.is_base else f"round {self.number}"

    @property
    def name(self) -> str:
        """As the datasets of Ray's dashboard have it: "base", "round_0", ..."""
        return "base" if self.is_base else f"round_{self.number}"

    @property
    def directory(self) -> str:
        """Below the run directory."""
        return "base" if self.is_base else f"rounds/{self.number:03d}"

    @property
    def before(self) -> Round:
        """The round before this one; for round 0 the base."""
        return Round(self.number - 1)

    @property
    def after(self) -> Round:
        """The round after this one; for the base round 0."""
        return Round(self.number + 1)


BASE = Round(-1)


def base_and_rounds(numbers: Iterable[int]) -> list[Round]:
    """The base, and the rounds with these numbers after it."""
    return [BASE, *map(Round, numbers)]
