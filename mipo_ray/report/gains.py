"""Where a gain sits, as a report tells it: tables by user, question and length, and the answers that moved most."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mipo_ray.evaluation.figures import format_moved
from mipo_ray.evaluation.held_out.effects import paired_answers
from mipo_ray.evaluation.held_out.metrics import MeasuredRows, scored_answers
from mipo_ray.evaluation.intervals import Estimate
from mipo_ray.measures import HELD_OUT, format_value
from mipo_ray.storage.gains import GainGroup, Gains

MOST_MOVED = 10  # answers each way
# Title of a table, and heading of its groups.
_TITLES = {
    "users": ("Users", "user"),
    "questions": ("Questions", "question"),
    "lengths": ("Length of the answers, mean of base and policy", "tokens"),
}


@dataclass(frozen=True)
class GainTable:
    """rows: label, prompts, change with its interval, change of length."""

    title: str
    heading: str
    note: str
    rows: list[tuple[str, str, str, str]]


def gain_subject(gains: Gains) -> str:
    """What was gained, for people."""
    return HELD_OUT[gains.measure].title


def gain_tables(gains: Gains) -> list[GainTable]:
    """A table for each kind of group; those of which there is one alone say nothing and are left out."""
    unit = HELD_OUT[gains.measure].unit
    tables = []
    for kind, found in gains.by.items():
        if found.count > 1:
            left_out = found.count - len(found.groups)
            note = f"{found.gained} of {found.count} gained"
            note += f"; {left_out} in the middle {'is' if left_out == 1 else 'are'} not shown" if left_out else ""
            tables.append(GainTable(*_TITLES[kind], note, [_row(group, unit) for group in found.groups]))
    return tables


def _row(group: GainGroup, unit: str) -> tuple[str, str, str, str]:
    if group.low is None or group.high is None:
        change = format_value(group.change, unit, signed=True)
    else:
        change = format_moved(Estimate(group.change, group.low, group.high, group.n), unit)
    return group.label, str(group.n), change, format_value(group.longer, "tokens", signed=True)


def answer_pmi(rows: MeasuredRows) -> NDArray[np.float64]:
    """Of each answer, [answers]: its PMI with the context or, where no row has one, with the prompt; nan for a row
    without a context beside rows with one."""
    if rows.initial_none is not None:
        return np.asarray(rows.initial_own - rows.initial_none)
    return scored_answers(rows)["pmi"].pmi


def most_moved(base: MeasuredRows, policy: MeasuredRows) -> list[list[dict[str, Any]]]:
    """The answers whose PMI rose most, and those whose PMI fell most, each beside the base's answer to the same prompt:
    two lists of dicts with prompt, change, and answer and PMI of both."""
    before, after = answer_pmi(base), answer_pmi(policy)
    pairs = [
        (float(after[row] - before[old]), row, old)
        for row, old in paired_answers(policy.prompt_ids, base.prompt_ids)
        if np.isfinite(after[row]) and np.isfinite(before[old])
    ]
    rises = sorted((pair for pair in pairs if pair[0] > 0), key=lambda pair: -pair[0])[:MOST_MOVED]
    falls = sorted(pair for pair in pairs if pair[0] < 0)[:MOST_MOVED]
    return [
        [
            {
                "prompt": policy.sources[row],
                "change": change,
                "base_answer": base.responses[old],
                "base_pmi": float(before[old]),
                "final_answer": policy.responses[row],
                "final_pmi": float(after[row]),
            }
            for change, row, old in side
        ]
        for side in (rises, falls)
    ]
