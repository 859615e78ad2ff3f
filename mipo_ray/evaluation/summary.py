"""What a run ends with: the primary measure first, and the lines that say whether its rise can be believed."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from mipo_ray.config.schema import Config
from mipo_ray.evaluation.figures import causes, final_tables, format_change
from mipo_ray.evaluation.intervals import FEW, change_word, clusters_behind, detectable_change, is_on_few
from mipo_ray.measures import HELD_OUT, PRIMARY, format_value, measure_of
from mipo_ray.storage.entries import Entries, Entry, Evaluation, Results
from mipo_ray.storage.results import read_evaluation, read_results, rounds_of
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import good_ones, last_good, verdicts

# How a PMI is raised without saying more: by length, which this bound leaves out, and by copying the prompt.
BESIDE = ("infonce_initial", "response_tokens", "copy_rate")
LINES = 4
MOST_CUT = 0.5  # share of cut answers beyond which fewer than half of the prompts can be expected to give a pair


@dataclass(frozen=True)
class Finding:
    """A measure of the newest good policy beside the base's; `word`: what the change says, "" without an interval."""

    name: str
    title: str
    base: float | None
    entry: Entry
    word: str


def findings(results: Results, evaluation: Evaluation) -> list[Finding]:
    """The primary measure, what a judge or the first task found where there is one, and what a PMI is read beside."""
    measured = rounds_of(results)
    policy = measured[-1] if measured else BASE.key
    entries, base = results.get(policy, {}), results.get(BASE.key, {})
    primary = primary_of(entries)
    names = dict.fromkeys([*([] if primary is None else [primary]), *BESIDE])
    held_out = [_finding(name, entries[name], base.get(name)) for name in names if name in entries]
    own = evaluation.get(policy, {})
    judged_first = sorted(own, key=lambda name: own[name].kind != "judge")
    others = [
        _finding(f"{name}.{metric}", own[name].metrics[metric], _of_base(evaluation, name, metric))
        for name in judged_first
        if (metric := own[name].metric) is not None
    ][:1]
    if others and len(held_out) == LINES:
        held_out = [*held_out[:1], *(found for found in held_out[1:] if found.name != "infonce_initial")]
    return [*held_out[:1], *others, *held_out[1:]]


def closing_text(run: RunDirectory, *, full: bool) -> str:
    """What a run is found to have reached; `full`: every measure as a table. "" where nothing was measured."""
    results, evaluation = _of_good_rounds(run)
    measured = rounds_of(results)
    about = [*closing_note(results.get(measured[-1] if measured else BASE.key, {})), *guard_lines(run)]
    if full or not results:
        return "\n".join([final_tables(run), *about])
    lines = finding_lines(findings(results, evaluation))
    after = f"after round {measured[-1]}; changes from the base, 95 % intervals" if measured else "the base"
    return "\n".join([*lines, *about, f"({after}; every measure: --full, or {run.path('report.html')})"])


def primary_of(entries: Entries) -> str | None:
    """The measure that a policy's entries are about: the one that is marked or, in what an earlier version wrote, the
    first of PRIMARY; None where there is neither, as where the policy has no figure of what the run named."""
    marked = [name for name, entry in entries.items() if entry.primary]
    if not marked and any(entry.holm_p_value is not None for entry in entries.values()):
        return None
    return next(iter([*marked, *(name for name in PRIMARY if name in entries)]), None)


def found_bad(run: RunDirectory) -> dict[Round, str]:
    """The measured rounds that the guard found bad, each with its causes in words."""
    found = verdicts(run, [Round(int(key)) for key in rounds_of(read_results(run))])
    return {round: causes(one) for round, one in found.items() if one.is_bad}


def guard_lines(run: RunDirectory) -> list[str]:
    """What the end of a run says of rounds that the guard found bad: why, and which policy it comes to."""
    bad = found_bad(run)
    if not bad:
        return []
    policy = last_good(run, Round(int(rounds_of(read_results(run))[-1])))
    whose = "the initial model" if policy.is_base else f"that of round {policy.key}"
    lines = [f"round {round.key} was found bad and is not promoted: {why}" for round, why in bad.items()]
    return [*lines, f"the run's policy is {whose}"]


def closing_note(entries: Entries) -> list[str]:
    """What stands below the lines of the end: what the finding rests on, and what the other lines are."""
    name = primary_of(entries)
    if name is None:
        return []
    others = sum(one.holm_p_value is not None for one in entries.values())
    lines = [few] if (few := few_text(entries)) else []
    if others:
        title = measure_of(name).title
        lines.append(
            f"({title} is the primary measure; verdicts on the {others} others are corrected for their number)"
        )
    return lines


def few_text(entries: Entries) -> str:
    """The warning about intervals behind which there is little; "" where there is enough."""
    name = primary_of(entries)
    if name is None or not is_on_few(entries[name]):
        return ""
    behind = clusters_behind(entries[name])
    return f"few clusters: {behind}; with fewer than {FEW} of a kind an interval is a rough guide"


def power_text(base: Entries) -> str:
    """Which change of the primary measure the held-out prompts could show, by the base's own spread; "" where that says
    nothing."""
    name = primary_of(base)
    change = None if name is None else detectable_change(base[name])
    if name is None or change is None:
        return ""
    measure = measure_of(name)
    return (
        f"{measure.title}: {clusters_behind(base[name])} show a change of about {format_value(change, measure.unit)} "
        f"{measure.unit} in 4 of 5 cases, if changes vary as the base's figures do"
    )


def limit_text(base: Entries, config: Config) -> str:
    """What is to be changed where the length limit cuts most answers of the base and pairs with such answers are left
    out; "" where it does not, or they are not."""
    cut = base.get("truncated")
    if cut is None or cut.value <= MOST_CUT or config.filters.truncated != "drop":
        return ""
    limit = config.generation.sampling.max_tokens
    return (
        f"the limit (generation.sampling.max_tokens {limit}) cut {cut.value:.0%} of the base's held-out answers, and "
        "filters.truncated=drop leaves out every pair with such an answer: expect few pairs; set "
        "filters.truncated=trim, or a larger limit"
    )


def finding_lines(found: Sequence[Finding]) -> list[str]:
    """A line for each finding, in columns."""
    rows = [
        (
            one.title,
            "" if one.base is None else f"{format_value(one.base, one.entry.unit)} ->",
            format_value(one.entry.value, one.entry.unit),
            one.entry.unit,
            format_change(one.entry),
            one.word,
        )
        for one in found
    ]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    numbers = (1, 2)
    return [
        "  ".join(
            cell.rjust(width) if column in numbers else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
            if width
        ).rstrip()
        for row in rows
    ]


def closing_values(run: RunDirectory) -> list[dict[str, Any]]:
    """The findings for machines, the primary measure first."""
    return [
        {
            "measure": one.name,
            "unit": one.entry.unit,
            "base": one.base,
            "value": one.entry.value,
            "change": one.entry.change,
            "change_low": one.entry.change_low,
            "change_high": one.entry.change_high,
            "verdict": one.word or None,
            "primary": position == 0,
            "users": one.entry.users,
            "questions": one.entry.questions,
        }
        for position, one in enumerate(findings(*_of_good_rounds(run)))
    ]


def _of_good_rounds(run: RunDirectory) -> tuple[Results, Evaluation]:
    """Of the policies that a run may stand by."""
    return good_ones(run, read_results(run)), good_ones(run, read_evaluation(run))


def _of_base(evaluation: Evaluation, name: str, metric: str) -> Entry | None:
    base = evaluation.get(BASE.key, {}).get(name)
    return None if base is None else base.metrics.get(metric)


def _finding(name: str, entry: Entry, base: Entry | None) -> Finding:
    title, better = measure_of(name).title, measure_of(name).better
    word = change_word(entry, better)
    ceiling = "" if entry.ceiling is None or name not in HELD_OUT else f" (at most {entry.ceiling:.3f})"
    return Finding(name, f"{title}{ceiling}", None if base is None or entry is base else base.value, entry, word)
