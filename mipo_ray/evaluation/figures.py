"""Figures as people read them: values, changes with their intervals, and the tables that a run ends with."""

from __future__ import annotations

from mipo_ray.evaluation.intervals import Estimate, change_word
from mipo_ray.measures import HELD_OUT, format_value, measure_of
from mipo_ray.storage.entries import Entry, Evaluation, Results
from mipo_ray.storage.manifests import BrokenBound, GuardFacts
from mipo_ray.storage.results import read_evaluation, read_results, rounds_of
from mipo_ray.storage.rounds import BASE
from mipo_ray.storage.run_directory import RunDirectory


def final_tables(run: RunDirectory) -> str:
    """Plain text: the table of results.json, and that of the tasks, each where there is anything to show."""
    results, evaluation = read_results(run), read_evaluation(run)
    tables = ([final_table(results)] if results else []) + ([task_table(evaluation)] if evaluation else [])
    return "\n\n".join(tables)


def task_table(evaluation: Evaluation) -> str:
    """Plain text: the main figure of every task, the base against each round, with n, interval and verdict."""
    header = ("task", "metric", "n", "policy", "value [95 % interval]", "change [95 % interval]", "")
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for entries in evaluation.values() for name in entries):
        for policy in ["base", *rounds_of(evaluation)]:
            entry = evaluation.get(policy, {}).get(name)
            if entry is None or entry.metric is None:
                continue
            figures = entry.metrics[entry.metric]
            estimate = Estimate.of_value(figures)
            value, low, high = (
                format_value(one, figures.unit) for one in (estimate.value, estimate.low, estimate.high)
            )
            lines.append(
                (
                    name,
                    entry.metric,
                    str(figures.n),
                    policy,
                    f"{value} [{low}, {high}]",
                    format_change(figures),
                    figures.verdict or "",
                )
            )
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *lines]]
    return "\n".join(row.rstrip() for row in [rows[0], "-" * len(rows[0].rstrip()), *rows[1:]])


def format_change(entry: Entry) -> str:
    """The change from the base with its interval, "+9.10 [+5.70, +12.50]"; empty where the entry has no change."""
    if entry.change is None:
        return ""
    change = Estimate.of_change(entry)
    return format_value(entry.change, entry.unit, signed=True) if change is None else format_moved(change, entry.unit)


def format_moved(change: Estimate, unit: str) -> str:
    """A change with its interval, "+9.10 [+5.70, +12.50]"."""
    figures = (change.value, change.low, change.high)
    scale = max(map(abs, figures))
    value, low, high = (format_value(figure, unit, signed=True, scale=scale) for figure in figures)
    return f"{value} [{low}, {high}]"


def causes(found: GuardFacts) -> str:
    """Every broken bound in words; "" where there is none."""
    return "; ".join(map(_cause, found.broken))


def _cause(one: BrokenBound) -> str:
    """A broken bound in words: "self-BLEU 0.412, expected at most 0.309 (the base has 0.109)"."""
    measure = measure_of(one.measure)
    value, bound, theirs = (format_value(number, measure.unit) for number in (one.value, one.bound, one.theirs))
    unit = "" if measure.unit == "share" else f" {measure.unit}"
    whose = "the base" if one.against == BASE.key else f"round {one.against}"
    return f"{measure.title} {value}{unit}, expected {one.side} {bound} ({whose} has {theirs})"


def final_table(results: Results) -> str:
    """Plain text, at most 110 columns: the base against each round, one line per metric and round."""
    header = ("metric", "unit", "base", "round", "value", "change [95 % interval]", "")
    lines: list[tuple[str, ...]] = []
    for name, measure in HELD_OUT.items():
        base = results.get("base", {}).get(name)
        rounds = [key for key in rounds_of(results) if name in results[key]]
        ceiling = base.ceiling if base else None
        unit_text = measure.unit.replace(" per ", "/") if ceiling is None else f"{measure.unit} (≤{ceiling:.3f})"
        first = (name, unit_text, format_value(base.value, measure.unit) if base else "")
        if base and not rounds:
            lines.append((*first, "", "", "", ""))
        for key in rounds:
            entry = results[key][name]
            word = change_word(entry)
            lines.append((*first, key, format_value(entry.value, measure.unit), format_change(entry), word))
            first = ("", "", "")
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    right = {2, 3, 4}  # numbers

    def render(line: tuple[str, ...]) -> str:
        cells = [
            cell.rjust(width) if column in right else cell.ljust(width)
            for column, (cell, width) in enumerate(zip(line, widths, strict=True))
        ]
        return "  ".join(cells).rstrip()

    return "\n".join([render(header), "-" * len(render(tuple("-" * width for width in widths))), *map(render, lines)])
