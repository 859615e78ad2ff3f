"""The generate stage as Ray Data pipelines: condition and render the prompts, sample, assemble and write pairs.

    prompts -> conditioning -> requests (token ids, seeds) -> vLLM pool -> pairs -> Parquet

The conditioned rows are written before any engine starts: bad prompts fail early, and a resumed stage samples exactly
the rows that have no pair yet, under the conditioning they had.
"""

from __future__ import annotations

import json
from typing import Any

import pyarrow as pa
import ray.data
from ray.data import ActorPoolStrategy
from ray.data.checkpoint import CheckpointConfig

from mipo_ray.blocks import map_blocks, ordered_context
from mipo_ray.conditioning import condition_block
from mipo_ray.config import Config
from mipo_ray.errors import UserError
from mipo_ray.generation.engine import REQUESTS, EngineSettings, Sampler
from mipo_ray.generation.rendering import check_length, load_tokenizer, render_prompts
from mipo_ray.monitoring import Events, progress
from mipo_ray.pairs import TOKEN_IDS, assemble_pairs, drop_table, merge_statistics, pair_statistics, prompt_fingerprint
from mipo_ray.prompt_check import check_training
from mipo_ray.prompts import blocks_of, read_prompts, rows_per_block
from mipo_ray.resources import Resources
from mipo_ray.seeds import stable_seed
from mipo_ray.storage import RunDirectory


class TooManyDroppedError(UserError):
    """The filters left too few pairs to train on; the message holds the table of reasons."""


def generate_pairs(
    config: Config, run: RunDirectory, round_index: int, *, policy: str, resources: Resources, events: Events
) -> dict[str, Any]:
    """Runs the generate stage of one round below the run directory; returns the facts for its manifest.

    `policy` names the model that samples; `events` is the actor that records metrics. Raises UserError for prompts that
    cannot be used and TooManyDroppedError when the filters drop more than `filters.max_dropped_share` of the rows.
    """
    stage = run.stage(round_index, "generate")
    filesystem = run.arrow_filesystem()
    conditioned = condition_prompts(config, run, round_index, policy=policy)

    with ordered_context() as context:
        context.checkpoint_config = CheckpointConfig(
            id_column="prompt_id",
            checkpoint_path=run.path(stage, "checkpoint"),
            delete_checkpoint_on_success=False,
            override_filesystem=filesystem,
        )
        rows = ray.data.read_parquet(run.path(stage, "conditioned"), filesystem=filesystem)
        rows = rows.repartition(target_num_rows_per_block=conditioned["rows_per_block"], strict=True)
        sampled = sample_responses(rows, config, policy=policy, resources=resources, events=events)
        pairs = map_blocks(sampled, assemble_pairs, seed=config.seed, round_index=round_index, filters=config.filters)
        with progress(events, "generated", "rows", f"round {round_index}  generate", total=conditioned["rows"]):
            pairs.write_parquet(run.path(stage), filesystem=filesystem)

    files = [name for name in run.list_files(stage) if name.endswith(".parquet") and "/" not in name]
    statistics = _statistics(run, stage, files)
    if statistics["fingerprint"] != conditioned["fingerprint"] or statistics["rows"] != conditioned["rows"]:
        raise RuntimeError(
            f"{stage}: the written pairs do not cover the prompts exactly once: expected {conditioned['rows']} rows, "
            f"found {statistics['rows']}. Remove {run.path(stage)} to generate again."
        )
    if statistics["kept"] == 0 or 1 - statistics["kept"] / statistics["rows"] > config.filters.max_dropped_share:
        raise TooManyDroppedError(
            f"{stage}: more than filters.max_dropped_share ({config.filters.max_dropped_share:.0%}) of the rows were "
            f"dropped\n{drop_table(statistics)}"
        )
    return {"pairs": files, "statistics": statistics, "policy": policy, "rows_per_block": conditioned["rows_per_block"]}


def condition_prompts(config: Config, run: RunDirectory, round_index: int, *, policy: str) -> dict[str, Any]:
    """Writes the conditioned rows of a round, once: what to sample, under what, with which seed.

    Returns {"rows", "rows_per_block", "fingerprint"}; a finished earlier call over the same directory answers at once.
    """
    stage = run.stage(round_index, "generate")
    if (text := run.read_text(f"{stage}/conditioned.json")) is not None:
        return json.loads(text)
    run.remove(stage)
    strategy = config.conditioning.strategy
    summary = check_training(config)
    block_rows = rows_per_block(summary.rows, config.conditioning.block_size)
    with ordered_context():
        rows = blocks_of(read_prompts(config.prompts, summary), summary.rows, config.conditioning.block_size)
        rows = map_blocks(rows, condition_block, strategy=strategy, seed=config.seed, round_index=round_index)
        rows = map_blocks(rows, add_requests, config=config, policy=policy, round_index=round_index)
        rows.write_parquet(run.path(stage, "conditioned"), filesystem=run.arrow_filesystem())
    written = ray.data.read_parquet(
        run.path(stage, "conditioned"), filesystem=run.arrow_filesystem(), columns=["prompt_id"]
    )
    fingerprint = 0
    for batch in written.iter_batches(batch_size=None):
        fingerprint += prompt_fingerprint(batch["prompt_id"])
    facts = {"rows": summary.rows, "rows_per_block": block_rows, "fingerprint": f"{fingerprint % 2**64:016x}"}
    run.write_text(f"{stage}/conditioned.json", json.dumps(facts))
    return facts


def add_requests(block: pa.Table, *, config: Config, policy: str, round_index: int) -> pa.Table:
    """Adds `prompt_token_ids` and `requests` (see engine.REQUESTS) to a block of conditioned rows.

    The matched request comes first; the mismatched one is left out where another row's matched response serves.
    """
    tokenizer = load_tokenizer(policy, config.model.trust_remote_code)
    rows = block.to_pylist()
    matched = render_prompts(tokenizer, [row["messages"] for row in rows])
    window = {"max_tokens": config.generation.sampling.max_tokens, "max_model_len": config.model.max_model_len}
    requests, dropped = [], []
    for row, token_ids in zip(rows, matched, strict=True):
        prompts = [token_ids]
        if row["partner_index"] < 0 and not row["dropped"]:
            prompts += render_prompts(tokenizer, [row["mismatched_messages"]])
        if config.filters.drop_too_long:
            too_long = any(len(ids) + window["max_tokens"] > window["max_model_len"] for ids in prompts)
            row["dropped"] = row["dropped"] or ("too_long" if too_long else "")
        else:
            for ids in prompts:
                check_length(row["prompt_id"], ids, **window)
        seeds = [
            stable_seed(config.seed, round_index, row["prompt_id"], 0, side) % 2**31 for side in ("chosen", "rejected")
        ]
        sampled = [] if row["dropped"] else zip(prompts, seeds, strict=False)
        requests.append([{"prompt_token_ids": ids, "seed": seed} for ids, seed in sampled])
        dropped.append(row["dropped"])
    block = block.set_column(block.schema.get_field_index("dropped"), "dropped", pa.array(dropped, pa.string()))
    block = block.append_column("prompt_token_ids", pa.array(matched, TOKEN_IDS))
    return block.append_column("requests", pa.array(requests, REQUESTS))


def sample_responses(
    rows: ray.data.Dataset, config: Config, *, policy: str, resources: Resources, events: Events
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through the pool of vLLM actors; a block stays a block."""
    pool = config.generation.pool
    settings = EngineSettings(
        model_path=policy,
        dtype=resources.dtype,
        max_model_len=config.model.max_model_len,
        trust_remote_code=config.model.trust_remote_code,
        tensor_parallel_size=pool.tensor_parallel_size,
        on_gpu=resources.on_gpu,
        sampling=config.generation.sampling,
        engine_args=pool.engine_args,
    )
    return rows.map_batches(
        Sampler,
        fn_constructor_args=(settings, events),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(
            min_size=pool.min_size,
            max_size=pool.max_size,
            max_tasks_in_flight_per_actor=2 * pool.batches_in_flight,
            max_concurrent_calls_per_actor=pool.batches_in_flight,
        ),
        num_cpus=pool.cpus_per_engine,
        num_gpus=resources.gpus_per_engine or None,
    )


def _statistics(run: RunDirectory, stage: str, files: list[str]) -> dict[str, Any]:
    pairs = ray.data.read_parquet([run.path(stage, name) for name in files], filesystem=run.arrow_filesystem())
    parts = pairs.map_batches(_statistics_row, batch_format="pyarrow", batch_size=1024)
    return merge_statistics(json.loads(row["statistics"]) for row in parts.iter_rows())


def _statistics_row(block: pa.Table) -> pa.Table:
    return pa.table({"statistics": [json.dumps(pair_statistics(block))]})
