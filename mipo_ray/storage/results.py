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

from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory

EVALUATION = "evaluation.json"
# A stage's manifest is found by where it lies: base or a round, tasks/NAME or judge/PROTOCOL.
_MANIFEST = re.compile(r"(?:rounds/(?P<round>\d+)|base)/(?:tasks|judge)/[^/.][^/]*/manifest\.json")


def read_evaluation(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """evaluation.json; {} before anything was measured."""
    return json.loads(run.read_text(EVALUATION) or "{}")


def gather_evaluation(run: RunDirectory) -> dict[str, dict[str, Any]]:
    """What evaluation.json holds, from every manifest with an `evaluation`, under its `name`."""
    found: dict[Round, dict[str, Any]] = {}
    for file in sorted([*_files(run, "base"), *_files(run, "rounds")]):
        match = _MANIFEST.fullmatch(file)
        manifest = run.read_manifest(file.removesuffix("/manifest.json")) if match else None
        if match and manifest is not None and "evaluation" in manifest:
            round = BASE if match["round"] is None else Round(int(match["round"]))
            found.setdefault(round, {})[manifest["name"]] = manifest["evaluation"]
    return {round.key: found[round] for round in sorted(found)}


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


def _files(run: RunDirectory, name: str) -> list[str]:
    return [f"{name}/{file}" for file in run.list_files(name)]


def rounds_of(results: dict[str, dict[str, Any]]) -> list[str]:
    """The keys of the rounds in results.json, in the order of the rounds; "base" is not among them."""
    return sorted((key for key in results if key != "base"), key=int)


def read_results(run: RunDirectory) -> dict[str, Any]:
    """results.json: measured policy ("base", "0", "1", ...) -> metric -> value, interval, unit and change."""
    return json.loads(run.read_text("results.json") or "{}")


def write_results(run: RunDirectory, rounds: int) -> None:
    """Writes results.json from the manifests of the evaluate stages, where that changes it."""
    measured = base_and_rounds(range(rounds))
    manifests = {round.key: run.read_manifest(run.stage(round, "evaluate")) for round in measured}
    results = {key: manifest["results"] for key, manifest in manifests.items() if manifest is not None}
    if results != read_results(run):
        run.write_text("results.json", json.dumps(results, indent=2))
