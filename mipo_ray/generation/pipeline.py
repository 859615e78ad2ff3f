"""The generate stage as Ray Data pipelines: condition and render the prompts, sample, assemble and write pairs.

    prompts -> (embeddings) -> conditioning -> requests (token ids, seeds) -> vLLM pool -> pairs -> Parquet

The conditioned rows are written before any engine samples (similar_prompt alone starts one before, which embeds): bad
prompts fail early, and a resumed stage samples exactly the rows that have no pair yet, under the conditioning they had.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Mapping
from typing import Any

import pyarrow as pa
import ray.data
from ray.data.checkpoint import CheckpointConfig

from mipo_ray.blocks import engine_pool, map_actors, map_blocks, named, ordered_context
from mipo_ray.conditioning_blocks import condition_block
from mipo_ray.config import Config
from mipo_ray.config_pairs import SamplingConfig
from mipo_ray.errors import UserError
from mipo_ray.generation.embedding import embed_rows
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Sampler, ToScore
from mipo_ray.generation.rendering import check_length, fits, load_tokenizer, render_prompts
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.monitoring import Events, progress
from mipo_ray.pair_statistics import drop_table, merge_statistics, pair_statistics, prompt_fingerprint
from mipo_ray.pairs import TOKEN_IDS, assemble_pairs, to_score
from mipo_ray.prompt_check import check_training
from mipo_ray.prompts import blocks_of, read_prompts, rows_per_block
from mipo_ray.resources import Resources, engine_request
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


def condition_prompts(
    config: Config, run: RunDirectory, round_index: int, *, policy: str, resources: Resources
) -> dict[str, Any]:
    """Writes the conditioned rows of a round, once: what to sample, under what, with which seed.

    Returns {"rows", "rows_per_block", "fingerprint"}; a finished earlier call over the same directory answers at once.
    Raises TooManyDroppedError when conditioning alone drops more than `filters.max_dropped_share` of the rows.
    """
    stage = run.stage(round_index, "generate")
    if (text := run.read_text(f"{stage}/conditioned.json")) is not None:
        return json.loads(text)
    run.remove(stage)
    summary = check_training(config)
    block_rows = rows_per_block(summary.rows, config.conditioning.block_size)
    with ordered_context():
        rows = blocks_of(read_prompts(config.prompts, summary), summary.rows, config.conditioning.block_size)
        if "similar_prompt" in config.conditioning.strategies:
            rows = embed_rows(rows, config, policy=policy, resources=resources)
        rows = map_blocks(
            rows,
            condition_block,
            conditioning=config.conditioning,
            prompts=config.prompts,
            seed=config.seed,
            round_index=round_index,
            negatives=config.generation.negatives_per_prompt,
        )
        rows = map_blocks(rows, add_requests, config=config, policy=policy, round_index=round_index)
        named(rows, f"round_{round_index}_conditioned").write_parquet(
            run.path(stage, "conditioned"), filesystem=run.arrow_filesystem()
        )
    written = ray.data.read_parquet(
        run.path(stage, "conditioned"), filesystem=run.arrow_filesystem(), columns=["prompt_id", "dropped"]
    )
    fingerprint = 0
    dropped: Counter[str] = Counter()
    for batch in written.iter_batches(batch_size=None):
        fingerprint += prompt_fingerprint(batch["prompt_id"])
        dropped.update(batch["dropped"].tolist())
    kept = dropped.pop("", 0)
    check_dropped(
        {"rows": summary.rows, "kept": kept, "dropped": dict(dropped)},
        f"{stage}, before sampling",
        config,
        "; mismatched prompts are drawn inside blocks of neighbouring rows: shuffle the prompts or raise "
        "conditioning.block_size where groups stand together, or set conditioning.fallback to another strategy",
    )
    facts = {"rows": summary.rows, "rows_per_block": block_rows, "fingerprint": f"{fingerprint % 2**64:016x}"}
    run.write_text(f"{stage}/conditioned.json", json.dumps(facts))
    return facts


def check_dropped(statistics: dict[str, Any], where: str, config: Config, hint: str = "") -> None:
    """Raises TooManyDroppedError, with the table of reasons, when too few rows are left to train on."""
    share = config.filters.max_dropped_share
    if statistics["kept"] == 0:
        what = "no row was kept"
    elif 1 - statistics["kept"] / statistics["rows"] > share:
        what = f"more than filters.max_dropped_share ({share:.0%}) of the rows were dropped"
    else:
        return
    raise TooManyDroppedError(f"{where}: {what}{hint}\n{drop_table(statistics)}")


def add_requests(block: pa.Table, *, config: Config, policy: str, round_index: int) -> pa.Table:
    """Adds `prompt_token_ids`, `mismatched_token_ids` and `requests` (engine.REQUESTS) to a block of conditioned rows.

    The n matched requests come first; the K mismatched ones are left out where other rows' matched responses serve. A
    row that gives no pair itself is sampled for the rows that reuse its matched responses, and otherwise not at all.
    Each request has a seed of its own, made of run seed, round, prompt_id, side and number.
    """
    tokenizer = load_tokenizer(policy, config.model.trust_remote_code)
    rows = block.to_pylist()
    matched = render_prompts(tokenizer, [row["messages"] for row in rows])
    mismatched = [render_prompts(tokenizer, row["mismatched_messages"]) for row in rows]
    window: dict[str, Any] = {
        "max_tokens": config.generation.sampling.max_tokens,
        "max_model_len": config.model.max_model_len,
    }
    for row, own, others in zip(rows, matched, mismatched, strict=True):
        if config.filters.drop_too_long:
            too_long = not all(fits(ids, **window) for ids in (own, *others))
            row["dropped"] = row["dropped"] or ("too_long" if too_long else "")
        else:
            for ids in (own, *others):
                check_length(row["prompt_id"], ids, **window)
    reused = {index for row in rows if not row["dropped"] for index in row["partner_index"]}
    requests = []
    for index, (row, own, others) in enumerate(zip(rows, matched, mismatched, strict=True)):
        sampled: list[tuple[str, int, list[int]]] = []
        if not row["dropped"] or (index in reused and fits(own, **window)):
            sampled += [("chosen", sample, own) for sample in range(config.generation.samples_per_prompt)]
        if not row["dropped"] and not row["partner_index"]:
            sampled += [("rejected", negative, ids) for negative, ids in enumerate(others)]
        requests.append(
            [
                {
                    "prompt_token_ids": ids,
                    "seed": stable_seed(config.seed, round_index, row["prompt_id"], number, side) % 2**31,
                }
                for side, number, ids in sampled
            ]
        )
    dropped = pa.array([row["dropped"] for row in rows], pa.string())
    block = block.set_column(block.schema.get_field_index("dropped"), "dropped", dropped)
    block = block.append_column("prompt_token_ids", pa.array(matched, TOKEN_IDS))
    block = block.append_column("mismatched_token_ids", pa.array(mismatched, pa.list_(TOKEN_IDS)))
    return block.append_column("requests", pa.array(requests, REQUESTS))


def sample_responses(
    rows: ray.data.Dataset,
    config: Config,
    *,
    policy: str,
    resources: Resources,
    events: Events,
    to_score: ToScore | None = None,
    sampling: Mapping[str, SamplingConfig] | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through the pool of vLLM actors; a block stays a block.

    With `to_score` also `scores`: log-probs of the responses that it gives for each block. `sampling`: parameters by
    the name that requests give (engine.REQUESTS), beside `generation.sampling`, which holds where they give none.
    """
    settings = engine_settings(config, policy, resources)
    named_sampling = {**(sampling or {}), DEFAULT_SAMPLING: config.generation.sampling}
    return map_actors(
        rows,
        Sampler,
        (settings, named_sampling, events, to_score, resources.gpus_per_engine),
        request=engine_request(config, resources),
        pool=engine_pool(config.generation.pool),
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def _statistics(run: RunDirectory, stage: str, files: list[str]) -> dict[str, Any]:
    pairs = ray.data.read_parquet([run.path(stage, name) for name in files], filesystem=run.arrow_filesystem())
    parts = pairs.map_batches(_statistics_row, batch_format="pyarrow", batch_size=1024)
    named(parts, f"{stage.replace('/', '_')}_statistics")
    return merge_statistics(json.loads(row["statistics"]) for row in parts.iter_rows())


def _statistics_row(block: pa.Table) -> pa.Table:
    return pa.table({"statistics": [json.dumps(pair_statistics(block))]})
