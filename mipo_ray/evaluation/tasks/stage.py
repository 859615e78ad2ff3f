"""Measures a policy on accuracy tasks: all unfinished tasks of a policy through one pool of engines.

    requests (task_requests) -> vLLM pool: sample or score -> final answer, verdict -> examples of each task -> metrics

A killed call samples only what is not written yet, and finished tasks are not touched. What is asked and how an answer
is judged stands in the task files; here is how it runs.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.dataset
import pyarrow.parquet

from mipo_ray.evaluation.intervals import BOOTSTRAP_SAMPLES
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.evaluation.significance import Measured, mean_entry, share_entry
from mipo_ray.evaluation.tasks.examples import EXAMPLE_SCHEMA, SAMPLED_SCHEMA, examples_of, options_to_score
from mipo_ray.evaluation.tasks.task import Task
from mipo_ray.evaluation.tasks.task_check import SAMPLED, CheckedTask, task_window
from mipo_ray.evaluation.tasks.task_requests import request_files
from mipo_ray.generation.engine import Sampling
from mipo_ray.generation.sampler import Engines, round_engines, sample_responses
from mipo_ray.measures import TASKS
from mipo_ray.monitoring.progress import progress
from mipo_ray.prompts.files import commit_of
from mipo_ray.ray_cluster.blocks import map_blocks, named, resumed_context
from mipo_ray.ray_cluster.tables import read_rows, write_rows
from mipo_ray.session import Session, Stage
from mipo_ray.storage.entries import Entries, Evaluated
from mipo_ray.storage.manifests import NOTES, TaskDefinition, TaskFacts
from mipo_ray.storage.records import read_record, to_text
from mipo_ray.storage.results import write_evaluation
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import PAGE_CHECKSUMS, open_table

# Rows that are written, and so safe from a kill, together.
ROWS_PER_BLOCK = 16


def measure_tasks(session: Session, round: Round, tasks: Sequence[CheckedTask]) -> None:
    """Measures one policy on every task that is not finished for it (prepared by `prepare_tasks`), base first.

    Writes examples/*.parquet and manifest.json of each task below the policy's stage `tasks`, and evaluation.json.
    """
    stage, run = session.stage(round, "tasks"), session.run
    unfinished = [task for task in tasks if not run.is_finished(task_stage(session, round, task).directory)]
    if not unfinished:
        run.remove(run.stage(round, SAMPLED))  # a kill right after the last commit leaves these two undone
        write_evaluation(run)
        if tasks:
            stage.say("finished before")
        return
    with stage.reported(f": {', '.join(task.name for task in unfinished)}") as report:
        sampled = _sample(stage, unfinished)
        for task in unfinished:
            report.commit(task_stage(session, round, task), _measured(stage, task, sampled))
            write_evaluation(run)
        run.remove(sampled)
        report.closing = f": {sum(task.items for task in unfinished)} items"


def task_stage(session: Session, round: Round, task: CheckedTask) -> Stage:
    """The stage of a task's results for one policy."""
    return session.stage(round, f"tasks/{task.name}")


def _measured(stage: Stage, task: CheckedTask, sampled: str) -> TaskFacts:
    """Writes a task's examples from the rows in `sampled`; returns the facts of its manifest."""
    session, round, config = stage.session, stage.round, stage.config
    own = task_stage(session, round, task)
    stage.run.remove(own.directory)
    examples = _write_examples(task, stage.run, sampled, f"{own.directory}/examples")
    base = None if round.is_base else read_examples(stage.run, BASE, task.name)
    metrics = measure_examples(task.task, examples, base, samples=BOOTSTRAP_SAMPLES, seed=config.seed)
    definition = task.definition
    evaluation = Evaluated(
        kind=definition.kind,
        version=definition.version,
        prompt_hash=definition.prompt_hash,
        data=definition.data,
        limit=definition.limit,
        sampling=definition.sampling,
        metric=definition.metric,
        metrics=metrics,
    )
    values = {f"{task.name}_{name}": metric.value for name, metric in metrics.items()}
    stage.events.emit({"event": "task", "task": task.name, **values})
    return TaskFacts(
        policy=session.policy(round),
        data_commit=commit_of(task.files),
        definition=definition,
        name=task.name,
        evaluation=evaluation,
    )


def read_examples(run: RunDirectory, round: Round, name: str) -> pa.Table:
    """The examples of a finished task (EXAMPLE_SCHEMA), in the order of its data. Test sets are small and fit."""
    path = run.path(run.stage(round, f"tasks/{name}"), "examples")
    return open_table(path, run.arrow_filesystem()).to_table()


def measure_examples(task: Task, examples: pa.Table, base: pa.Table | None, *, samples: int, seed: int) -> Entries:
    """The metrics of a task's examples, as evaluation.json has them; with `base` also the paired change."""
    columns = _metric_columns(task, examples)
    base_columns = {} if base is None else _metric_columns(task, base)
    items = examples["item_id"].to_pylist()
    base_items = [] if base is None else base["item_id"].to_pylist()
    metrics = {}
    clusters = _clusters(examples)
    for name, values in columns.items():
        before: Measured | None = None if base is None else (base_columns[name], base_items)
        entry = share_entry if TASKS[name].unit == "share" else mean_entry
        metrics[name] = entry(TASKS[name], (values, items), before, samples=samples, seed=seed, clusters=clusters)
    return metrics


def _clusters(examples: pa.Table) -> Clusters | None:
    """Which items are alike; None where the task does not say, or an earlier version did not write it down."""
    if "question" not in examples.column_names or not any(examples["question"].to_pylist()):
        return None
    items = examples["item_id"].to_pylist()
    users, questions = (dict(zip(items, examples[name].to_pylist(), strict=True)) for name in ("user", "question"))
    return Clusters(users if any(users.values()) else None, questions)


def _metric_columns(task: Task, examples: pa.Table) -> dict[str, list[Any]]:
    """Metric -> its value for each example."""
    rows = examples.to_pylist()
    columns = {"accuracy": [row["verdict"] == "correct" for row in rows]}
    if task.kind == "likelihood":
        columns["accuracy_normalized"] = [row["extracted_normalized"] == row["answer"] for row in rows]
        answer = "extracted_normalized" if task.metric == "accuracy_normalized" else "extracted"
        columns["no_answer"] = [row[answer] is None for row in rows]
        return columns
    columns["no_answer"] = [row["verdict"] == "no_answer" for row in rows]
    if task.kind == "choice":
        return columns
    columns["truncated"] = [row["finish_reason"] == "length" for row in rows]
    columns["response_tokens"] = [row["tokens"] for row in rows]
    return columns


def _sample(stage: Stage, tasks: Sequence[CheckedTask]) -> str:
    """Samples and scores all items of the tasks; returns the directory with the rows (SAMPLED_SCHEMA)."""
    run, round, session = stage.run, stage.round, stage.session
    directory = run.stage(round, SAMPLED)
    # What a killed call left is used again, unless a task meant something else then.
    wanted = {task.name: task.definition for task in tasks}
    name = f"{directory}/definitions.json"
    found = read_record(dict[str, TaskDefinition], run.read_text(name) or "{}", run.path(name))
    if any(found.get(name, definition) != definition for name, definition in wanted.items()):
        run.remove(directory)
        found = {}
    run.write_text(name, to_text(found | wanted))
    filesystem = run.arrow_filesystem()
    total = sum(task.items for task in tasks)
    sampling = Sampling({task.name: task.sampling for task in tasks if task.sampling is not None})
    with resumed_context(run.path(directory, NOTES), filesystem, id_column="key"):
        files = [file for task in tasks for file in request_files(run, task.name)]
        rows = read_rows(files, filesystem)
        rows = rows.repartition(target_num_rows_per_block=ROWS_PER_BLOCK, strict=True)
        engines = task_engines(session, round)
        answered = sample_responses(rows, engines, sampling, stage.events, options_to_score)
        examples = map_blocks(answered, examples_of, tasks={task.name: task.task for task in tasks})
        with progress(stage.events, "tasks", "rows", total):
            write_rows(named(examples, f"{round.name}_tasks"), run.path(directory, "rows"), filesystem)
    return directory


def task_engines(session: Session, round: Round) -> Engines:
    """The engines of a policy with the tasks' window in the place of the run's own."""
    engines = round_engines(session, round)
    return replace(engines, settings=replace(engines.settings, max_model_len=task_window(session.config)))


def _write_examples(task: CheckedTask, run: RunDirectory, sampled: str, name: str) -> pa.Table:
    """The rows of one task as one Parquet file, in the order of its data; raises RuntimeError unless all are there."""
    filesystem = run.arrow_filesystem()
    rows = open_table(run.path(sampled, "rows"), filesystem, SAMPLED_SCHEMA.names)
    table = rows.to_table(filter=pyarrow.dataset.field("task") == task.name).sort_by("position")
    if table["position"].to_pylist() != list(range(task.items)):
        raise RuntimeError(
            f"{run.path(sampled)}: the rows of {task.name} do not cover its items exactly once: expected {task.items}, "
            f"found {table.num_rows}. Remove that directory to measure again."
        )
    examples = table.select(EXAMPLE_SCHEMA.names).cast(EXAMPLE_SCHEMA)
    filesystem.create_dir(run.path(name), recursive=True)
    path = run.path(name, "part-0.parquet")
    pyarrow.parquet.write_table(examples, path, filesystem=filesystem, **PAGE_CHECKSUMS)
    return examples
