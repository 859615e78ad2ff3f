"""What comparison.json holds, as records."""

from __future__ import annotations

from dataclasses import dataclass

from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.storage.entries import Entries
from mipo_ray.storage.records import optional


@dataclass(frozen=True, kw_only=True)
class Difference:
    """The paired change of a measure from the control to an arm."""

    change: float
    """In `unit`, as are the ends of its interval."""
    change_low: float
    change_high: float
    n: int
    """How many items both have."""
    unit: str
    verdict: str
    """As `Entry.verdict`."""

    @property
    def estimate(self) -> Estimate:
        return Estimate(self.change, self.change_low, self.change_high, self.n)


@dataclass(frozen=True, kw_only=True)
class ArmOutcome:
    """An arm of the comparison, or the base, after the last round."""

    swapped_pairs: int | None = optional()
    """Of a control: in how many of its pairs chosen and rejected are swapped."""
    description: str
    """Objective, strategy and what is unusual, for people."""
    control: bool
    """Whether it must not win."""
    seconds: dict[str, float]
    """By stage, over all seeds and rounds."""
    measures: Entries
    """By measure, those of tasks as "task.metric"."""
    against_control: dict[str, Difference] | None = optional()
    """By control: how the headline measure compares; None for the base."""


@dataclass(frozen=True, kw_only=True)
class EqualData:
    """What all arms have the same of."""

    pairs: int
    """Trained on in each epoch, over all seeds and rounds."""
    steps: int
    """Optimizer steps, over all seeds and rounds."""
    batch_size: int
    """Pairs of a step."""
    epochs: int


@dataclass(frozen=True, kw_only=True)
class Outcome:
    """What a comparison found."""

    headline: str
    """The measure that it is about."""
    seeds: list[int]
    judged: bool
    """Whether a judge was asked."""
    rounds: int
    equal: EqualData
    control: list[str]
    """What the control shows, in sentences."""
    findings: list[str]
    """A sentence for each arm."""
    unfinished: list[str]
    """Arms that are not measured with every seed yet."""
    arms: dict[str, ArmOutcome]
    """By name, the base first."""
