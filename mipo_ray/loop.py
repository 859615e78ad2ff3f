"""The rounds: generate -> train -> evaluate, each stage committed once, the same command resuming where it stopped."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from hashlib import sha256
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import ray.data

from mipo_ray import monitoring
from mipo_ray.blocks import map_blocks, named, ordered_context
from mipo_ray.config import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.accuracy import measure_tasks
from mipo_ray.evaluation.evaluation_file import final_tables
from mipo_ray.evaluation.held_out import measure_policy
from mipo_ray.evaluation.judging import judge_policy, reach_judge
from mipo_ray.evaluation.measured import measured_rows
from mipo_ray.evaluation.results import measure
from mipo_ray.evaluation.task_check import CheckedTask, check_tasks
from mipo_ray.evaluation.task_requests import prepare_tasks
from mipo_ray.generation.pipeline import condition_prompts, generate_pairs
from mipo_ray.monitoring import Events, progress
from mipo_ray.pairs import as_version_2, shuffle_labels
from mipo_ray.report.run_report import read_results, write_report, write_results
from mipo_ray.resources import Request, Resources, engine_request, worker_request
from mipo_ray.stages import once
from mipo_ray.storage import RunDirectory
from mipo_ray.training.trainer import CHECKPOINTS, check_training, train_policy


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


def generate(
    config: Config, run: RunDirectory, round_index: int, policy: str, resources: Resources, events: Events
) -> dict[str, Any]:
    """The generate stage: pairs sampled from `policy`. Returns the stage's manifest."""

    def work(stage_events: Events) -> dict[str, Any]:
        facts = generate_pairs(config, run, round_index, policy=policy, resources=resources, events=stage_events)
        for reason, rows in facts["statistics"]["dropped"].items():
            stage_events.emit({"event": "dropped", "reason": reason, "dropped_pairs": rows})
        stage_events.emit({"event": "pairs", **_numbers(facts["statistics"])})
        return {**facts, "gpus": _gpus(engine_request(config, resources))}

    return once(config, run, round_index, "generate", events, work)


def train(
    config: Config,
    run: RunDirectory,
    round_index: int,
    policy: str,
    pairs: dict[str, Any],
    resources: Resources,
    events: Events,
    only: frozenset[str] | None = None,
) -> str:
    """The train stage: preference optimisation of `policy` on the round's pairs. Returns the new policy's path.

    `only`: the pair_ids among the kept pairs to train on, each of which must be there; None: all. A stage that was
    interrupted goes on from its newest checkpoint, unless its pairs were generated again since, or are others.
    """
    stage = run.stage(round_index, "train")
    reference = policy if config.train.reference == "round_start" else config.model.path

    trained_on = pairs["finished"] if only is None else f"{pairs['finished']} {pair_set_hash(only)}"

    def work(stage_events: Events) -> dict[str, Any]:
        if run.read_text(f"{stage}/pairs.txt") != trained_on:
            run.remove(stage)
            run.write_text(f"{stage}/pairs.txt", trained_on)
        run.remove(f"{stage}/policy")
        with progress(stage_events, "train_step", "step", f"round {round_index}  train"):
            summary = train_policy(
                config,
                _training_pairs(config, run, pairs, only),
                pairs["statistics"]["kept"] if only is None else len(only),
                policy=policy,
                reference=reference,
                run=run,
                stage=stage,
                resources=resources,
                events=stage_events,
            )
        run.remove(f"{stage}/{CHECKPOINTS}")
        facts = {
            "summary": asdict(summary),
            "reference": reference if config.train.needs_reference else None,
            "gpus": _gpus(worker_request(config, resources)),
        }
        return facts if only is None else {**facts, "pair_set": pair_set_hash(only)}

    once(config, run, round_index, "train", events, work)
    return run.model_path(f"{stage}/policy")


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
        return {**facts, "results": results, "gpus": _gpus(engine_request(config, resources))}

    once(config, run, round_index, "evaluate", events, work)
    write_results(run, config.rounds)
    write_report(config, run)


def pair_set_hash(pair_ids: frozenset[str]) -> str:
    """Names a set of pairs, 16 hex digits."""
    return sha256("\n".join(sorted(pair_ids)).encode()).hexdigest()[:16]


def _training_pairs(
    config: Config, run: RunDirectory, pairs: dict[str, Any], only: frozenset[str] | None
) -> ray.data.Dataset:
    """The round's kept pairs in training order (by pair_id, which is a seeded shuffle), in the form of version 2.

    `only`: see `train`. Raises UserError where the objective reads a column that the pairs were written without.
    """
    files = [run.path(pairs["stage"], name) for name in pairs["pairs"]]
    columns = ["pair_id", "prompt_token_ids", "chosen_token_ids", "rejected_token_ids", "dropped"]
    if config.train.objective == "sami":
        columns.append("mismatched_prompt_token_ids")
    # Ray Data leaves out what a file does not have, without a word.
    found = pyarrow.parquet.read_schema(files[0], filesystem=run.arrow_filesystem()).names
    if missing := set(columns) - set(found):
        raise UserError(
            f"{files[0]}: train.objective {config.train.objective}: expected the columns "
            f"{', '.join(sorted(missing))} too, found {', '.join(found)}; generate these pairs again"
        )
    with ordered_context():
        dataset = ray.data.read_parquet(files, filesystem=run.arrow_filesystem(), columns=columns)
        seed = config.seed if config.train.shuffle_labels else None
        kept = map_blocks(dataset, _kept_only, only=only, shuffle_seed=seed)
        return named(kept.sort("pair_id"), f"round_{pairs['round']}_training_pairs")


def _kept_only(block: pa.Table, *, only: frozenset[str] | None, shuffle_seed: int | None) -> pa.Table:
    kept = block.filter(pyarrow.compute.equal(block["dropped"], "")).drop_columns(["dropped"])
    if only is not None:
        kept = kept.filter(pyarrow.compute.is_in(kept["pair_id"], pa.array(sorted(only), pa.string())))
    kept = as_version_2(kept)
    return kept if shuffle_seed is None else shuffle_labels(kept, shuffle_seed)


def _gpus(request: Request) -> float:
    """How many GPUs a stage reserves at most; scoring actors take the places of engines."""
    return request.most * request.gpus


def _numbers(facts: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}
