"""The generate stage: conditioned prompts through the engines, assembled to pairs, counted and committed."""

from __future__ import annotations

import functools
import json
from typing import Any

import pyarrow as pa
import pyarrow.compute
import pyarrow.parquet
import ray.data
from ray.data.checkpoint import CheckpointConfig

from mipo_ray.config.schema import Config
from mipo_ray.generation.pipeline import sample_responses
from mipo_ray.generation.requests import check_dropped, condition_prompts
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import progress
from mipo_ray.pairs.assemble import assemble_pairs, to_score
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.pairs.statistics import merge_statistics, pair_statistics
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.resources import Resources, engine_request, most_gpus
from mipo_ray.session import once
from mipo_ray.storage.run_directory import RunDirectory


def generate_pairs(
    config: Config, run: RunDirectory, round_index: int, *, policy: str, resources: Resources, events: Events
) -> dict[str, Any]:
    """Runs the generate stage of one round below the run directory; returns the facts for its manifest.

    `policy` names the model that samples; `events` is the actor that records metrics. Raises UserError for prompts that
    cannot be used and TooManyDroppedError when the filters drop more than `filters.max_dropped_share` of the rows.
    """
    stage = run.stage(round_index, "generate")
    filesystem = run.arrow_filesystem()
    conditioned = condition_prompts(config, run, round_index, policy=policy, resources=resources)
    score = functools.partial(to_score, generation=config.generation, filters=config.filters)

    with ordered_context() as context:
        context.checkpoint_config = CheckpointConfig(
            id_column="prompt_id",
            checkpoint_path=run.path(stage, "checkpoint"),
            delete_checkpoint_on_success=False,
            override_filesystem=filesystem,
        )
        rows = ray.data.read_parquet(run.path(stage, "conditioned"), filesystem=filesystem)
        rows = rows.repartition(target_num_rows_per_block=conditioned["rows_per_block"], strict=True)
        sampled = sample_responses(
            rows,
            config,
            policy=policy,
            resources=resources,
            events=events,
            to_score=score if config.generation.score_pmi else None,
        )
        pairs = map_blocks(
            sampled,
            assemble_pairs,
            seed=config.seed,
            round_index=round_index,
            generation=config.generation,
            filters=config.filters,
        )
        with progress(events, "generated", "rows", f"round {round_index}  generate", total=conditioned["rows"]):
            named(pairs, f"round_{round_index}_pairs").write_parquet(run.path(stage), filesystem=filesystem)

    files = [name for name in run.list_files(stage) if name.endswith(".parquet") and "/" not in name]
    statistics = _statistics(run, stage, files)
    expected = conditioned["rows"] * config.generation.samples_per_prompt
    if statistics["fingerprint"] != conditioned["fingerprint"] or statistics["rows"] != expected:
        raise RuntimeError(
            f"{stage}: the written pairs do not cover the prompts exactly once: expected {expected} rows, "
            f"found {statistics['rows']}. Remove {run.path(stage)} to generate again."
        )
    check_dropped(statistics, stage, config)
    return {"pairs": files, "statistics": statistics, "policy": policy, "rows_per_block": conditioned["rows_per_block"]}


def _statistics(run: RunDirectory, stage: str, files: list[str]) -> dict[str, Any]:
    pairs = ray.data.read_parquet([run.path(stage, name) for name in files], filesystem=run.arrow_filesystem())
    parts = pairs.map_batches(_statistics_row, batch_format="pyarrow", batch_size=1024)
    named(parts, f"{stage.replace('/', '_')}_statistics")
    return merge_statistics(json.loads(row["statistics"]) for row in parts.iter_rows())


def _statistics_row(block: pa.Table) -> pa.Table:
    return pa.table({"statistics": [json.dumps(pair_statistics(as_version_2(block)))]})


def generate(
    config: Config, run: RunDirectory, round_index: int, policy: str, resources: Resources, events: Events
) -> dict[str, Any]:
    """The generate stage: pairs sampled from `policy`. Returns the stage's manifest."""

    def work(stage_events: Events) -> dict[str, Any]:
        facts = generate_pairs(config, run, round_index, policy=policy, resources=resources, events=stage_events)
        for reason, rows in facts["statistics"]["dropped"].items():
            stage_events.emit({"event": "dropped", "reason": reason, "dropped_pairs": rows})
        stage_events.emit({"event": "pairs", **_numbers(facts["statistics"])})
        return {**facts, "gpus": most_gpus(engine_request(config, resources))}

    return once(config, run, round_index, "generate", events, work)


def _numbers(facts: dict[str, Any]) -> dict[str, float]:
    return {name: value for name, value in facts.items() if isinstance(value, int | float)}
