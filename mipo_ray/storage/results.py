"""results.json and evaluation.json: what every policy of a run reached, gathered from the manifests of its stages.

results.json has what was measured on the held-out prompts, evaluation.json the tasks and judgements. What they hold of
a policy stands in `entries`.
"""

from __future__ import annotations

import re
from collections.abc import Iterable

from mipo_ray.storage.entries import Evaluated, Evaluation, Results
from mipo_ray.storage.manifests import MANIFEST, EvaluateFacts, JudgeFacts, TaskFacts
from mipo_ray.storage.records import Record, RecordError, read_record, to_text
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, StorageError

RESULTS = "results.json"
EVALUATION = "evaluation.json"
# A stage's manifest is found by where it lies: base or a round, tasks/NAME or judge/PROTOCOL.
_MANIFEST = re.compile(rf"(?:rounds/(?P<round>\d+)|base)/(?P<kind>tasks|judge)/[^/.][^/]*/{re.escape(MANIFEST)}")


def read_results(run: RunDirectory) -> Results:
    """What results.json holds; {} before anything was measured. Raises StorageError, naming file and field, where it
    holds something else."""
    return _read(run, RESULTS, Results)


def write_results(run: RunDirectory, rounds: int) -> None:
    """Writes results.json from the manifests of the evaluate stages, where that changes it."""
    measured = base_and_rounds(range(rounds))
    manifests = {round.key: run.read_manifest(run.stage(round, "evaluate"), EvaluateFacts) for round in measured}
    results = {key: manifest.facts.results for key, manifest in manifests.items() if manifest is not None}
    if results != read_results(run):
        run.write_text(RESULTS, to_text(results))


def read_evaluation(run: RunDirectory) -> Evaluation:
    """What evaluation.json holds; {} before anything was measured. Raises as `read_results` does."""
    return _read(run, EVALUATION, Evaluation)


def gather_evaluation(run: RunDirectory) -> Evaluation:
    """What evaluation.json is to hold, from every manifest of a task or a judgement."""
    found: dict[Round, dict[str, Evaluated]] = {}
    for file in sorted([*_files(run, "base"), *_files(run, "rounds")]):
        if (match := _MANIFEST.fullmatch(file)) is None:
            continue
        stage = file.removesuffix(f"/{MANIFEST}")
        kind: type[TaskFacts | JudgeFacts] = TaskFacts if match["kind"] == "tasks" else JudgeFacts
        manifest = run.read_manifest(stage, kind)
        if manifest is not None:
            round = BASE if match["round"] is None else Round(int(match["round"]))
            found.setdefault(round, {})[manifest.facts.name] = manifest.facts.evaluation
    return {round.key: found[round] for round in sorted(found)}


def write_evaluation(run: RunDirectory) -> Evaluation:
    """Writes evaluation.json from the manifests, where that changes it."""
    evaluation = gather_evaluation(run)
    if evaluation != read_evaluation(run):
        run.write_text(EVALUATION, to_text(evaluation))
    return evaluation


def is_report_current(run: RunDirectory) -> bool:
    """Whether report.html is there and no file of results, nor a verdict of the guard, was written after it."""
    written = run.modified("report.html")
    found = [name for name in _files(run, "rounds") if name.endswith(f"/guard/{MANIFEST}")]
    read = [run.modified(name) for name in (RESULTS, EVALUATION, *found)]
    return written is not None and all(time is None or time <= written for time in read)


def rounds_of(results: Iterable[str]) -> list[str]:
    """The keys of the rounds among those of policies, in the order of the rounds; "base" is not among them."""
    return sorted((key for key in results if key != BASE.key), key=int)


def _read(run: RunDirectory, name: str, kind: type[Record]) -> Record:
    try:
        return read_record(kind, run.read_text(name) or "{}", run.path(name))
    except RecordError as error:
        raise StorageError(f"{error}. Remove that file: it is written anew from the finished stages.") from None


def _files(run: RunDirectory, name: str) -> list[str]:
    return [f"{name}/{file}" for file in run.list_files(name)]
