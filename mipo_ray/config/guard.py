"""The guard section: by which bounds a round is found bad, and what a run does then.

Nothing here imports torch, ray or vllm.
"""

from __future__ import annotations

from typing import Any, Literal

from pydantic import field_validator

from mipo_ray.config.base import Section, execution_only
from mipo_ray.config.field_types import NonNegativeFloat
from mipo_ray.errors import brief
from mipo_ray.measures import ECHO_SHARES, HELD_OUT, TASKS, Measure

Side = Literal["min_ratio", "max_ratio", "max_rise", "max_fall"]
Bound = dict[Side, NonNegativeFloat]

# Wide: each is far from what a round that goes well moves, and is there for collapse. Repetition inside an answer is
# what distinct_2 falls by, answers to different prompts that become one are what corpus_distinct_2 and self_bleu tell.
DEFAULT_BOUNDS: dict[str, Bound | None] = {
    "response_tokens": {"min_ratio": 0.5, "max_ratio": 2.0},
    "truncated": {"max_rise": 0.3},
    "copy_rate": {"max_rise": 0.2},
    "distinct_2": {"min_ratio": 0.8},
    "corpus_distinct_2": {"max_fall": 0.3},
    "self_bleu": {"max_rise": 0.2},
    "kl_per_token": {"max_rise": 1.0},
}


class GuardConfig(Section):
    """Whether a round's policy is compared with bounds before the next round may start from it."""

    when_bad: Literal["stop", "halve_learning_rate"] | None = execution_only(
        None,
        "what follows a round that breaks a bound, whose policy is kept and no round starts from: stop: the run ends "
        "with the last good policy; halve_learning_rate: the next round starts from the last good policy, with half of "
        "train.learning_rate for each bad round before it; null: no round is compared",
    )
    bounds: dict[str, Bound | None] = execution_only(
        DEFAULT_BOUNDS,
        "what a round may be beside the base: measure of results.json, or TASK.METRIC of evaluation.json, to min_ratio "
        "and max_ratio of the base's figure, max_rise and max_fall from it in the measure's unit; null takes a default "
        "bound out. Besides, the primary measure and the metric of each task must not fall below the interval of the "
        "best policy before",
    )

    @field_validator("bounds", mode="before")
    @classmethod
    def _stand_beside_the_defaults(cls, bounds: Any) -> Any:
        return {**DEFAULT_BOUNDS, **bounds} if isinstance(bounds, dict) else bounds

    @field_validator("bounds")
    @classmethod
    def _bound_what_is_measured(cls, bounds: dict[str, Bound | None]) -> dict[str, Bound | None]:
        for name, bound in bounds.items():
            measure = _measure(name)
            if bound is None:
                continue
            if name in ECHO_SHARES:
                raise ValueError(f"{name}: expected a measure that every policy has, found one that only a rise has")
            if not bound:
                raise ValueError(f"{name}: expected at least one of min_ratio, max_ratio, max_rise, max_fall")
            if measure.unit not in ("share", "tokens") and {"min_ratio", "max_ratio"} & bound.keys():
                raise ValueError(
                    f"{name}: expected max_rise or max_fall, found a ratio, which says nothing of a figure that may be "
                    "below 0"
                )
            if bound.get("min_ratio", 0.0) > 1 or bound.get("max_ratio", 1.0) < 1:
                raise ValueError(f"{name}: expected bounds that the base itself keeps, found {bound}")
        return bounds


def _measure(name: str) -> Measure:
    """The measure of a bound; raises ValueError for one that nothing computes."""
    task, _, metric = name.rpartition(".")
    measure = TASKS.get(metric) if task else HELD_OUT.get(name)
    if measure is None:
        raise ValueError(
            f"{brief(name)}: expected one of {', '.join(HELD_OUT)}, or TASK.METRIC with one of {', '.join(TASKS)}"
        )
    return measure
