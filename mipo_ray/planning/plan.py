"""What a run will do, worked out without an engine: checked prompts, pairs, steps, resources, what is finished."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from mipo_ray.conditioning.needs import check_held_out, check_training
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.judge.rows import check_judge, judged_protocols
from mipo_ray.evaluation.tasks.task_check import CheckedTask, check_finished_tasks, check_tasks, task_stage
from mipo_ray.models.source import check_model, embedding_model
from mipo_ray.monitoring.trackers import check_trackers
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.resources import (
    Node,
    NodeType,
    Resources,
    check_resources,
    resolve,
)
from mipo_ray.storage.results import is_report_current, read_evaluation
from mipo_ray.storage.run_directory import RunDirectory


@dataclass(frozen=True)
class Plan:
    """A checked run. `finished` holds the names of the stages that are done already; `nodes` and `types` are those of
    `resources.check_resources`."""

    config: Config
    run: RunDirectory
    resources: Resources
    prompts: PromptSummary
    held_out: PromptSummary | None
    finished: tuple[str, ...]
    nodes: Sequence[Node] | None = None
    types: Sequence[NodeType] | None = None
    tasks: tuple[CheckedTask, ...] = ()

    @property
    def stages(self) -> list[str]:
        """Every stage of the run, in order."""
        names = self._measured(None)
        for round_index in range(self.config.rounds):
            names += [self.run.stage(round_index, "generate"), self.run.stage(round_index, "train")]
            names += self._measured(round_index)
        return names

    def _measured(self, round_index: int | None) -> list[str]:
        return measured_stages(self.config, self.run, round_index, self.tasks)

    @property
    def is_finished(self) -> bool:
        """Every stage is finished, and the files of results and report.html were written after the last one."""
        return set(self.stages) <= set(self.finished) and self._is_reported()

    def _is_reported(self) -> bool:
        # A kill right after the last stage was committed leaves older results, or a report of older results.
        measured = {"base", *map(str, range(self.config.rounds))} if self.config.evaluate.enabled else set()
        if not measured <= json.loads(self.run.read_text("results.json") or "{}").keys():
            return False
        evaluation = read_evaluation(self.run)
        names = {task.name for task in self.tasks}
        if any(not names <= evaluation.get(policy, {}).keys() for policy in measured):
            return False
        return is_report_current(self.run)


def make_plan(
    config: Config,
    run: RunDirectory,
    cluster: Mapping[str, float],
    nodes: Sequence[Node] | None = None,
    types: Sequence[NodeType] | None = None,
) -> Plan:
    """Checks everything that can be checked without an engine; raises UserError for what a user must mend.

    `cluster`, `nodes` and `types` are those of `resources.check_resources`.
    """
    check_trackers(config.trackers)
    check_model(config.model.path)
    if "similar_prompt" in config.conditioning.strategies and config.conditioning.similar.model is not None:
        embedding_model(config.conditioning.similar.model)
    prompts = check_training(config)
    held_out = check_held_out(config) if config.evaluate.enabled else None
    tasks = check_tasks(config) if config.evaluate.enabled else ()
    resources = resolve(config, cluster)
    check_resources(config, resources, cluster, nodes, types)
    run.check_writable()
    run.check_config(config)
    check_judge(config, run)
    check_finished_tasks(tasks, run, range(config.rounds))
    finished = finished_stages(config, run, tasks)
    return Plan(config, run, resources, prompts, held_out, finished, nodes, types, tasks)


def measured_stages(
    config: Config, run: RunDirectory, round_index: int | None, tasks: Sequence[CheckedTask]
) -> list[str]:
    """The stages in which one policy is measured, in order; none without evaluation."""
    if not config.evaluate.enabled:
        return []
    of_tasks = [task_stage(run, round_index, task.name) for task in tasks]
    protocols = judged_protocols(config.evaluate.judge, round_index)
    judged = [run.stage(round_index, f"judge/{protocol}") for protocol in protocols]
    return [run.stage(round_index, "evaluate"), *of_tasks, *judged]


def finished_stages(config: Config, run: RunDirectory, tasks: Sequence[CheckedTask] = ()) -> tuple[str, ...]:
    """Names of the finished stages in the run directory; raises StorageError for a damaged one."""
    measured = ["evaluate", *(f"tasks/{task.name}" for task in tasks), "judge/pairwise", "judge/pointwise"]
    candidates = [run.stage(None, stage) for stage in measured]
    for round_index in range(config.rounds):
        candidates += [run.stage(round_index, stage) for stage in ("generate", "train", *measured)]
    return tuple(stage for stage in candidates if run.read_manifest(stage) is not None)
