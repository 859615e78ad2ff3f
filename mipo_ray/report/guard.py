"""The guard's verdicts as a report tells them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from mipo_ray.evaluation.figures import causes
from mipo_ray.measures import format_value, measure_of
from mipo_ray.storage.entries import Results
from mipo_ray.storage.manifests import GuardFacts
from mipo_ray.storage.results import rounds_of
from mipo_ray.storage.rounds import BASE

Verdicts = Mapping[str, GuardFacts]  # by policy


def bad_keys(verdicts: Verdicts) -> list[str]:
    """The keys of the policies that were found bad."""
    return [key for key, verdict in verdicts.items() if verdict.is_bad]


def guard_sentences(verdicts: Verdicts, results: Results) -> list[str]:
    """Why rounds were not promoted, and which policy the run comes to; none where nothing was compared."""
    bad = bad_keys(verdicts)
    if not bad:
        return ["The guard found no bound broken."] if verdicts else []
    good = [key for key in rounds_of(results) if key not in bad]
    policy = f"that of round {good[-1]}" if good else "the initial model"
    found = [f"The guard found round {key} bad: {causes(verdicts[key])}." for key in bad]
    return [*found, f"No round starts from a policy that was found bad; the policy of the run is {policy}."]


def guard_rows(verdicts: Verdicts) -> list[dict[str, Any]]:
    """A row for each broken bound, with what was found and expected; one for a round that broke none."""
    rows = []
    for key, verdict in verdicts.items():
        if not verdict.broken:
            none = dict.fromkeys(("unit", "value", "expected", "against"), "")
            rows.append({"round": key, "measure": f"all {verdict.compared} bounds kept", **none})
        for one in verdict.broken:
            measure = measure_of(one.measure)
            value, bound, theirs = (format_value(number, measure.unit) for number in (one.value, one.bound, one.theirs))
            whose = "the base" if one.against == BASE.key else f"round {one.against}"
            rows.append(
                {
                    "round": key,
                    "measure": one.measure,
                    "unit": measure.unit,
                    "value": value,
                    "expected": f"{one.side} {bound}",
                    "against": f"{whose}: {theirs}",
                }
            )
    return rows
