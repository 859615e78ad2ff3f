"""What results.json and evaluation.json hold of a policy: figures with their intervals and changes.

results.json: {policy: {measure: Entry}}; evaluation.json: {policy: {task or protocol of the judge: Evaluated}}. A
policy is named by its key: "base", or the number of the round after which it stood.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from mipo_ray.storage.records import optional


@dataclass(frozen=True)
class Entry:
    """A measured figure with its 95 % interval and, for a round's policy, its change from the base on the same items.

    What it is called and which way is better stands in `measures`.
    """

    value: float
    """In `unit`, as are the ends of intervals and the changes."""
    low: float | None
    """The lower end of the interval; None for a figure without one."""
    high: float | None
    """The upper end of the interval; None for a figure without one."""
    n: int
    """How many items it is made of: prompts, or questions of a task."""
    unit: str
    """As `Measure.unit`."""
    interval: str | None = optional()
    """What made the interval, of a task or a judgement: "wilson" or "bootstrap"."""
    change: float | None = optional()
    """The mean change from the base, paired by item; None for the base."""
    change_low: float | None = optional(beside="change")
    """The lower end of the change's interval; None for a figure without one."""
    change_high: float | None = optional(beside="change")
    """The upper end of the change's interval; None for a figure without one."""
    fixed: int | None = optional()
    """Items that the round's policy alone gets right, where McNemar's test applies."""
    broken: int | None = optional()
    """Items that the base alone gets right, where McNemar's test applies."""
    p_value: float | None = optional()
    """Of McNemar's exact test, two-sided."""
    seed_changes: list[float] | None = optional()
    """In a comparison with several seeds: the change with each of them."""
    verdict: str | None = optional()
    """What the change says: "better", "worse", "rose", "fell" or "not distinguishable"; None where it says nothing."""
    ceiling: float | None = optional()
    """The largest value that an estimate with this many other conditionings can reach, of InfoNCE: ln(K + 1) nats."""
    users: int | None = optional()
    """How many users the items are of, where they name any; intervals resample users and questions."""
    questions: int | None = optional()
    """How many different questions the items ask; None where nobody knows, and items alone are resampled."""
    primary: bool | None = optional()
    """True of the measure that the run named beforehand (`evaluate.primary`), None of every other."""
    change_p_value: float | None = optional()
    """Of the change being 0, two-sided, by Student's t with the error and the degrees of freedom of its interval."""
    holm_p_value: float | None = optional()
    """The same, corrected (Holm 1979) for the number of exploratory measures of the policy; None of the primary one."""


Entries = dict[str, Entry]  # by measure
Results = dict[str, Entries]  # by policy


@dataclass(frozen=True, kw_only=True)
class Evaluated:
    """What was measured of a policy on a task, or by a protocol of the judge; those of one definition are compared."""

    kind: str
    """Of a task "generative" or "likelihood"; "judge"."""
    version: int | None = optional()
    """Of the task's file, or of the judge's protocol."""
    prompt_hash: str | None = optional()
    """12 hex digits of what is asked beside the items."""
    data: str | None = optional()
    """Of a task: the path of its items."""
    limit: int | None = optional(beside="data")
    """Of a task: how many of the first items are measured; None: all."""
    sampling: dict[str, Any] | None = optional(beside="data")
    """Of a task: the fields of `SamplingConfig`; None for a likelihood task, which samples nothing."""
    prompt: str | None = optional()
    """Of a judgement: the template of what the judge is asked."""
    judge: str | None = optional()
    """Of a judgement: the model that judged."""
    metric: str | None = optional()
    """The metric that a comparison is about."""
    metrics: Entries
    """By metric, in the order in which they are shown."""


Evaluation = dict[str, dict[str, Evaluated]]  # by policy, then by the name of the task or protocol
