"""The evaluate stage: everything that is measured of a policy, in order."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.metrics import measure
from mipo_ray.evaluation.held_out.rows import measured_rows
from mipo_ray.evaluation.held_out.stage import measure_policy
from mipo_ray.evaluation.judge.stage import judge_policy
from mipo_ray.evaluation.tasks.stage import measure_tasks
from mipo_ray.evaluation.tasks.task_check import CheckedTask
from mipo_ray.monitoring.events import Events
from mipo_ray.ray_cluster.resources import Resources, engine_request, most_gpus
from mipo_ray.report.run_report import write_report
from mipo_ray.session import once
from mipo_ray.storage.results import write_results
from mipo_ray.storage.run_directory import RunDirectory


def evaluate_all(
    config: Config,
    run: RunDirectory,
    round_index: int | None,
    policy: str,
    initial: str,
    tasks: Sequence[CheckedTask],
    resources: Resources,
    events: Events,
) -> None:
    """Everything that is measured of a policy: on held-out prompts, on the tasks (prepared before), by the judge."""
    evaluate(config, run, round_index, policy, initial, resources, events)
    measure_tasks(tasks, config, run, round_index, policy=policy, resources=resources, events=events)
    judge_policy(config, run, round_index, resources, events)


def evaluate(
    config: Config,
    run: RunDirectory,
    round_index: int | None,
    policy: str,
    initial: str,
    resources: Resources,
    events: Events,
) -> None:
    """The evaluate stage: measures `policy` on the held-out prompts, against the base; updates results and report."""

    def work(stage_events: Events) -> dict[str, Any]:
        facts = measure_policy(
            config, run, round_index, policy=policy, initial=initial, resources=resources, events=stage_events
        )
        results = measure(
            measured_rows(run, round_index),
            None if round_index is None else measured_rows(run, None),
            beta=config.train.beta,
            samples=config.evaluate.bootstrap_samples,
            seed=config.seed,
        )
        stage_events.emit({"event": "results", **{name: entry["value"] for name, entry in results.items()}})
        return {**facts, "results": results, "gpus": most_gpus(engine_request(config, resources))}

    once(config, run, round_index, "evaluate", events, work)
    write_results(run, config.rounds)
    write_report(config, run)
