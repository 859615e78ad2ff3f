"""The rounds: generate -> train -> evaluate, each stage committed once, the same command resuming where it stopped."""

from __future__ import annotations

from typing import Any

from mipo_ray.config.schema import Config
from mipo_ray.evaluation.figures import final_tables
from mipo_ray.evaluation.judge.stage import reach_judge
from mipo_ray.evaluation.stage import evaluate_all
from mipo_ray.evaluation.tasks.task_check import check_tasks
from mipo_ray.evaluation.tasks.task_requests import prepare_tasks
from mipo_ray.generation.requests import condition_prompts
from mipo_ray.generation.stage import generate
from mipo_ray.monitoring import events as monitoring
from mipo_ray.ray_cluster.resources import Resources
from mipo_ray.report.run_report import write_report
from mipo_ray.storage.results import read_results
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.training.stage import train
from mipo_ray.training.trainer import check_training


def run_rounds(config: Config, run: RunDirectory, resources: Resources) -> dict[str, Any]:
    """Runs every unfinished stage of every round; returns the results (`results.json`), policy by policy."""
    policy = initial = config.model.path
    tasks = check_tasks(config) if config.evaluate.enabled else ()
    with monitoring.recording(run, config.trackers) as events:
        # A model that cannot be trained so, a judge that does not answer, and prompts that cannot be used, are told
        # before any engine samples.
        check_training(config)
        reach_judge(config.evaluate.judge)
        condition_prompts(config, run, 0, policy=initial, resources=resources)
        prepare_tasks(tasks, config, run, policy=initial)
        if config.evaluate.enabled:
            evaluate_all(config, run, None, policy, initial, tasks, resources, events)
        for round_index in range(config.rounds):
            pairs = generate(config, run, round_index, policy, resources, events)
            policy = train(config, run, round_index, policy, pairs, resources, events)
            if config.evaluate.enabled:
                evaluate_all(config, run, round_index, policy, initial, tasks, resources, events)
                print(f"\n{final_tables(run)}\n", flush=True)
    write_report(config, run)
    return read_results(run)
