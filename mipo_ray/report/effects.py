"""What a rise has beyond length and verbatim copies, as a report tells it: a row for each round and kind of PMI."""

from __future__ import annotations

from dataclasses import dataclass

from mipo_ray.evaluation.figures import format_change
from mipo_ray.evaluation.intervals import Estimate, change_word
from mipo_ray.measures import ECHO_SHARES, HELD_OUT, format_value
from mipo_ray.storage.entries import Entries, Entry, Results
from mipo_ray.storage.results import rounds_of

NOT_MEASURED = "not measured"
NO_RISE = "no clear rise"
NOT_KNOWN = "not known"  # where every length changed by as much
# Whole PMI -> its change per token, with lengths matched, at equal length and without copies, and its echo share.
COLUMNS = {
    "context_pmi_initial": (
        "context_pmi_per_token",
        "context_pmi_matched",
        "context_pmi_adjusted",
        "context_pmi_copy_free",
        "context_pmi_echo",
    ),
    "pmi_initial": ("pmi_initial_per_token", "pmi_matched", "pmi_adjusted", "pmi_copy_free", "pmi_echo"),
}


@dataclass(frozen=True)
class Cell:
    """A change with its interval, or the echo share; word: what the change says."""

    shown: str
    word: str = ""


@dataclass(frozen=True)
class EffectRow:
    """cells: of the whole answers, then those of COLUMNS."""

    round: str
    title: str
    cells: list[Cell]


def effect_rows(results: Results) -> list[EffectRow]:
    """The changes from the base of each round's PMI, and what is left of them; none before a round was measured."""
    return [
        EffectRow(key, HELD_OUT[whole].title, [_cell(results[key], name) for name in (whole, *parts)])
        for key in rounds_of(results)
        for whole, parts in COLUMNS.items()
        if whole in results[key]
    ]


def _cell(entries: Entries, name: str) -> Cell:
    entry = entries.get(name)
    if name in ECHO_SHARES:
        without = entries.get(name.replace("_echo", "_copy_free"))
        measured = without is not None and without.change is not None
        return _echo(entry) if entry is not None else Cell(NO_RISE if measured else NOT_MEASURED)
    if entry is None or entry.change is None:
        beside = name.endswith("_adjusted") and name.replace("_adjusted", "_copy_free") in entries
        return Cell(NOT_KNOWN if beside else NOT_MEASURED)
    return Cell(format_change(entry), change_word(entry))


def _echo(entry: Entry) -> Cell:
    figures = Estimate.of_value(entry)
    value, low, high = (format_value(one, entry.unit) for one in (figures.value, figures.low, figures.high))
    return Cell(f"{value} [{low}, {high}]")
