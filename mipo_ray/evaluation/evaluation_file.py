"""evaluation.json: what every policy of a run reached, gathered from the manifests of tasks and judgements.

{"base": {name: entry}, "0": {name: entry}, ...}, policies named as in results.json. An entry holds what was measured
(kind, version, prompt_hash, data, ...) and `metrics`: metric -> value, low, high (95 % interval), n, unit, interval;
for a round also change, change_low, change_high, verdict and, for accuracy, fixed, broken and p_value, against the base
on the same items.
"""

from __future__ import annotations

import json
import re
from typing import Any

from mipo_ray.evaluation.results import final_table, format_change, format_value, rounds_of
from mipo_ray.storage import RunDirectory

EVALUATION = "evaluation.json"
# A stage's manifest is found by where it lies: base or a round, tasks/NAME or judge/PROTOCOL.
_MANIFEST = re.compile(r"(?:rounds/(?P<round>\d+)|base)/(?:tasks|judge)/[^/.][^/]*/manifest\.json")


def read_evaluation(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """evaluation.json; {} before anything was measured."""
    return json.loads(run.read_text(EVALUATION) or "{}")


def gather_evaluation(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What evaluation.json holds, from every manifest with an `evaluation`, under its `name`."""
    found: dict[int, dict[str, Any]] = {}
    for file in sorted([*_files(run, "base"), *_files(run, "rounds")]):
        match = _MANIFEST.fullmatch(file)
        manifest = run.read_manifest(file.removesuffix("/manifest.json")) if match else None
        if match and manifest is not None and "evaluation" in manifest:
            policy = -1 if match["round"] is None else int(match["round"])
            found.setdefault(policy, {})[manifest["name"]] = manifest["evaluation"]
    return {"base" if policy < 0 else str(policy): found[policy] for policy in sorted(found)}


def is_report_current(run: RunDirectory) -> bool:
    """Whether report.html is there and no file of results was written after it."""
    written = run.modified("report.html")
    read = [run.modified(name) for name in ("results.json", EVALUATION)]
    return written is not None and all(time is None or time <= written for time in read)


def write_evaluation(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """Writes evaluation.json from the manifests, where that changes it."""
    evaluation = gather_evaluation(run)
    if evaluation != read_evaluation(run):
        run.write_text(EVALUATION, json.dumps(evaluation, indent=2))
    return evaluation


def final_tables(run: RunDirectory) -> str:
    """Plain text: the table of results.json, and that of the tasks, each where there is anything to show."""
    results, evaluation = json.loads(run.read_text("results.json") or "{}"), read_evaluation(run)
    tables = ([final_table(results)] if results else []) + ([task_table(evaluation)] if evaluation else [])
    return "\n\n".join(tables)


def task_table(evaluation: dict[str, dict[str, Any]]) -> str:
    """Plain text: the main figure of every task, the base against each round, with n, interval and verdict."""
    header = ("task", "metric", "n", "policy", "value [95 % interval]", "change [95 % interval]", "")
    lines: list[tuple[str, ...]] = []
    for name in dict.fromkeys(name for entries in evaluation.values() for name in entries):
        for policy in ["base", *rounds_of(evaluation)]:
            entry = evaluation.get(policy, {}).get(name)
            if entry is None or "metric" not in entry:
                continue
            figures = entry["metrics"][entry["metric"]]
            value, low, high = (format_value(figures[key], figures["unit"]) for key in ("value", "low", "high"))
            lines.append(
                (
                    name,
                    entry["metric"],
                    str(figures["n"]),
                    policy,
                    f"{value} [{low}, {high}]",
                    format_change(figures),
                    figures.get("verdict", ""),
                )
            )
    widths = [max(len(line[column]) for line in [header, *lines]) for column in range(len(header))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in [header, *lines]]
    return "\n".join(row.rstrip() for row in [rows[0], "-" * len(rows[0].rstrip()), *rows[1:]])


def _files(run: RunDirectory, name: str) -> list[str]:
    return [f"{name}/{file}" for file in run.list_files(name)]
