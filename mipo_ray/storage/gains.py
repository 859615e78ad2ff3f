"""Where a PMI's gain sits, as the manifest of a round's evaluate stage has it: by user, question and length."""

from __future__ import annotations

from dataclasses import dataclass

from mipo_ray.storage.records import optional


@dataclass(frozen=True, kw_only=True)
class GainGroup:
    """Held-out prompts that have something in common."""

    label: str
    """What that is, for people: the user's group or context, the question, or the tokens of the base's answers."""
    n: int
    """How many prompts."""
    change: float
    """Mean change of the PMI from the base, nats per response."""
    low: float | None = optional()
    """The lower end of its interval; None for a single prompt."""
    high: float | None = optional()
    """The upper end of its interval; None for a single prompt."""
    longer: float
    """Mean change of the length, tokens."""


@dataclass(frozen=True, kw_only=True)
class GainsBy:
    """All groups of a kind."""

    count: int
    """How many there are."""
    gained: int
    """Of how many the mean change is above zero."""
    groups: list[GainGroup]
    """Those that gained most and those that lost most, the largest gain first; lengths in their own order."""


@dataclass(frozen=True, kw_only=True)
class Gains:
    """Of one policy."""

    measure: str
    """What it gained of, a name of results.json."""
    by: dict[str, GainsBy]
    """By "users", "questions" and "lengths"; users are left out where no prompt names any."""
