"""The measures of a comparison's table, and what they say in plain words: the control first, then each arm."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mipo_ray.comparison.definition import BASE
from mipo_ray.comparison.records import ArmOutcome
from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import Estimate, word_against
from mipo_ray.evaluation.significance import sentence
from mipo_ray.measures import HELD_OUT, Measure, measure_of
from mipo_ray.storage.entries import Entries

# Of results.json, in the order of the table.
COMPARED = (
    "context_pmi_initial",
    "pmi_initial",
    "reward_accuracy",
    "kl_per_token",
    "response_tokens",
    "truncated",
    "distinct_2",
    "copy_rate",
)
# Of evaluation.json, where tasks or a judge were asked for.
COMPARED_TASK_METRICS = ("accuracy", "net_win", "rating")


def measures_of(arms: Mapping[str, ArmOutcome]) -> dict[str, Measure]:
    """The columns of the table: the held-out measures and the tasks that some arm has."""
    found = [name for arm in arms.values() for name in arm.measures]
    held_out = [name for name in COMPARED if name in found]
    return {name: measure_of(name) for name in dict.fromkeys([*held_out, *found])}


def control_sentences(control: str, arms: Mapping[str, ArmOutcome]) -> list[str]:
    """What the control shows, the measures in which more is better first; a gain is said as plainly as none."""
    if control not in arms:
        return [f"The control {control} has not been measured yet."]
    columns = [(name, one) for name, one in measures_of(arms).items() if one.better == "higher"]
    entries = [(name, one, arms[control].measures[name]) for name, one in columns if name in arms[control].measures]
    won = [(name, one) for name, one, entry in entries if entry.verdict == "better"]
    names = ", ".join(one.title for _, one, _ in entries)
    if not won:
        first = f"The control ({control}) shows no gain in any of: {names}."
    else:
        gains = ", ".join(one.title for _, one in won)
        first = (
            f"Finding: the control ({control}) shows a gain in {gains}. A gain of this size says nothing about what an "
            "arm was trained to prefer."
        )
    return [first, *(_sentence(control, name, one, arms) for name, one, entry in entries if entry.change is not None)]


def findings(headline: str, arms: Mapping[str, ArmOutcome]) -> list[str]:
    """For each arm a sentence about the measure that the comparison is about; where it is better, also what a rise may
    rest on: the measures without a better direction that moved."""
    measure = measures_of(arms)[headline]
    return [
        f"{arm}: {_sentence(arm, headline, measure, arms)}{_but(arms[arm].measures, headline)}"
        for arm in arms
        if arm != BASE and headline in arms[arm].measures
    ]


def _but(measures: Entries, headline: str) -> str:
    """What else moved where the headline is better, as " But length fell (...)."; KL moves in any training."""
    if measures[headline].verdict != "better":
        return ""
    moved = [
        f"{HELD_OUT[name].title} {measures[name].verdict} ({format_change(measures[name])})"
        for name in COMPARED
        if name != "kl_per_token" and name in measures and measures[name].verdict in ("rose", "fell")
    ]
    return f" But {', '.join(moved)}." if moved else ""


def _sentence(arm: str, name: str, measure: Measure, arms: Mapping[str, ArmOutcome]) -> str:
    entry, base = arms[arm].measures[name], arms[BASE].measures.get(name)
    change = Estimate.of_change(entry)
    if change is None:
        return f"{measure.title} has no interval."
    if base is None:  # the base is not judged against itself: the figure is its own change
        said = word_against(str(entry.verdict), "the base")
        return f"Judged in pairs, {arm} is {said}: wins less losses {format_change(entry)} ({entry.n} items)."
    before, after = Estimate.of_value(base), Estimate.of_value(entry)
    tested: Any = {"p_value": entry.p_value, "holm_p_value": entry.holm_p_value}
    return sentence(measure.title, before, after, change, unit=measure.unit, **tested)
