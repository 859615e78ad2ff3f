"""The measures of a comparison's table, and what they say in plain words: the control first, then each arm."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from mipo_ray.comparison.definition import BASE
from mipo_ray.evaluation.figures import change_of, format_change
from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.evaluation.significance import sentence
from mipo_ray.measures import UNITS

Direction = Literal["higher", "neither"]


@dataclass(frozen=True)
class Measure:
    """How a column of the table is called, and whether more of it is better."""

    title: str
    unit: str
    direction: Direction


# Of results.json, in the order of the table. What has no better direction only rises or falls.
HELD_OUT = {
    "context_pmi_initial": Measure("context PMI", UNITS["context_pmi_initial"], "higher"),
    "pmi_initial": Measure("leave-one-out PMI", UNITS["pmi_initial"], "higher"),
    "reward_accuracy": Measure("reward accuracy", "share", "higher"),
    "kl_per_token": Measure("KL to the base", UNITS["kl_per_token"], "neither"),
    "response_tokens": Measure("length", "tokens", "neither"),
    "truncated": Measure("cut at the limit", "share", "neither"),
    "distinct_2": Measure("distinct 2-grams", "share", "neither"),
    "copy_rate": Measure("copied 3-grams", "share", "neither"),
}
# Of evaluation.json, where tasks or a judge were asked for.
TASK_METRICS = {"accuracy": "higher", "net_win": "higher", "rating": "higher"}


def measures_of(arms: dict[str, dict[str, Any]]) -> dict[str, Measure]:
    """The columns of the table: the held-out measures and the tasks that some arm has."""
    found = [name for arm in arms.values() for name in arm["measures"]]
    columns = {name: measure for name, measure in HELD_OUT.items() if name in found}
    for name in found:
        if name not in columns:
            task, _, metric = name.rpartition(".")
            unit = next(arm["measures"][name]["unit"] for arm in arms.values() if name in arm["measures"])
            columns[name] = Measure(f"{task} {metric.replace('_', ' ')}", unit, TASK_METRICS[metric])  # type: ignore[arg-type]
    return columns


def control_sentences(control: str, arms: dict[str, dict[str, Any]]) -> list[str]:
    """What the control shows, the measures in which more is better first; a gain is said as plainly as none."""
    if control not in arms:
        return [f"The control {control} has not been measured yet."]
    columns = [(name, one) for name, one in measures_of(arms).items() if one.direction == "higher"]
    entries = [
        (name, one, arms[control]["measures"][name]) for name, one in columns if name in arms[control]["measures"]
    ]
    won = [(name, one) for name, one, entry in entries if entry.get("verdict") == "better"]
    names = ", ".join(one.title for _, one, _ in entries)
    if not won:
        first = f"The control ({control}) shows no gain in any of: {names}."
    else:
        gains = ", ".join(one.title for _, one in won)
        first = (
            f"Finding: the control ({control}) shows a gain in {gains}. A gain of this size says nothing about what an "
            "arm was trained to prefer."
        )
    return [first, *(_sentence(control, name, one, arms) for name, one, entry in entries if "change" in entry)]


def findings(headline: str, arms: dict[str, dict[str, Any]]) -> list[str]:
    """For each arm a sentence about the measure that the comparison is about; where it is better, also what a rise may
    rest on: the measures without a better direction that moved."""
    measure = measures_of(arms)[headline]
    return [
        f"{arm}: {_sentence(arm, headline, measure, arms)}{_but(arms[arm]['measures'], headline)}"
        for arm in arms
        if arm != BASE and headline in arms[arm]["measures"]
    ]


def _but(measures: dict[str, dict[str, Any]], headline: str) -> str:
    """What else moved where the headline is better, as " But length fell (...)."; KL moves in any training."""
    if measures[headline].get("verdict") != "better":
        return ""
    moved = [
        f"{measure.title} {measures[name]['verdict']} ({format_change(measures[name])})"
        for name, measure in HELD_OUT.items()
        if name != "kl_per_token" and measures.get(name, {}).get("verdict") in ("rose", "fell")
    ]
    return f" But {', '.join(moved)}." if moved else ""


def _sentence(arm: str, name: str, measure: Measure, arms: dict[str, dict[str, Any]]) -> str:
    entry, base = arms[arm]["measures"][name], arms[BASE]["measures"].get(name)
    change = change_of(entry)
    if change is None:
        return f"{measure.title} has no interval."
    if base is None:  # the base is not judged against itself: the figure is its own change
        joined = "from" if entry["verdict"] == "not distinguishable" else "than"
        return (
            f"Judged in pairs, {arm} is {entry['verdict']} {joined} the base: wins less losses {format_change(entry)} "
            f"({entry['n']} items)."
        )
    before, after = (Estimate(one["value"], one["low"], one["high"], one["n"]) for one in (base, entry))
    return sentence(measure.title, before, after, change, unit=measure.unit, p_value=entry.get("p_value"))
