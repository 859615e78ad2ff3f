"""The generate stage: conditioned prompts through the engines, assembled to pairs, counted and committed."""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import ray.data

from mipo_ray.generation.deaths import QUARANTINE, deaths_of, quarantined
from mipo_ray.generation.engine import DEFAULT_SAMPLING, Sampling
from mipo_ray.generation.preferences import add_rewards
from mipo_ray.generation.requests import check_dropped, condition_prompts
from mipo_ray.generation.sampler import ToScore, round_engines, sample_responses
from mipo_ray.models.hub import model_commit
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import progress
from mipo_ray.pairs.assemble import assemble_pairs, to_score
from mipo_ray.pairs.preferences import choose_pairs, responses_to_score
from mipo_ray.pairs.schema import as_version_2
from mipo_ray.pairs.statistics import merge_statistics, pair_statistics
from mipo_ray.pairs.written import CONDITIONED_ROWS
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.blocks import map_blocks, named, resumed_context
from mipo_ray.ray_cluster.resources import most_gpus
from mipo_ray.ray_cluster.tables import read_rows, write_rows
from mipo_ray.session import Session, Stage
from mipo_ray.storage.manifests import NOTES, GenerateFacts, Manifest
from mipo_ray.storage.pair_statistics import PairStatistics
from mipo_ray.storage.rounds import Round


def generate(session: Session, round: Round, prompts: PromptSummary) -> Manifest[GenerateFacts]:
    """The generate stage: pairs sampled from the policy that the round starts from. Returns the stage's manifest.

    `prompts` are the checked training prompts. Raises what `generate_pairs` raises.
    """
    stage = session.stage(round, "generate")
    if (manifest := stage.finished_before(GenerateFacts)) is not None:
        return manifest
    with stage.reported() as report:
        facts = generate_pairs(stage, prompts)
        manifest, counts = report.commit(stage, facts, files=facts.pairs), facts.statistics
        trimmed = f", {counts.trimmed_responses} responses trimmed" if counts.trimmed_responses else ""
        report.closing = f": {counts.kept} pairs kept of {counts.rows}{trimmed}, {counts.generated_tokens} tokens"
        if facts.quarantined:
            report.closing += f"; prompts set aside because engines died of them: {facts.quarantined} ({QUARANTINE})"
    return manifest


def generate_pairs(stage: Stage, prompts: PromptSummary) -> GenerateFacts:
    """Samples and writes the pairs of a round; returns the facts for the stage's manifest.

    Raises UserError for prompts that cannot be used, TooManyDroppedError when the filters drop more than
    `filters.max_dropped_share` of the rows and QuarantineError when engines die of more than
    `generation.max_quarantined_share` of them.
    """
    config, round = stage.config, stage.round
    policy = stage.session.policy(stage.session.start(round))
    filesystem = stage.run.arrow_filesystem()
    conditioned = condition_prompts(stage.session, round, prompts)
    engines = round_engines(stage.session, stage.session.start(round))
    score: ToScore = responses_to_score
    if config.preference.is_mipo:
        score = functools.partial(to_score, generation=config.generation, filters=config.filters)

    with (
        deaths_of(stage, conditioned.rows) as deaths,
        resumed_context(stage.path(NOTES), filesystem, id_column="prompt_id"),
    ):
        rows = read_rows(stage.path(CONDITIONED_ROWS), filesystem)
        rows = rows.repartition(target_num_rows_per_block=conditioned.rows_per_block, strict=True)
        sampled = sample_responses(
            rows,
            replace(engines, deaths=deaths),
            Sampling({DEFAULT_SAMPLING: config.generation.sampling}, trims=config.filters.truncated == "trim"),
            stage.events,
            score if config.scores_pmi else None,
        )
        pairs = _pairs_of(sampled, stage)
        with progress(stage.events, "generate", "rows", conditioned.rows):
            write_rows(named(pairs, f"{round.name}_pairs"), stage.path(), filesystem)

    expected = conditioned.rows * config.generation.samples_per_prompt
    files, statistics = count_pairs(stage, expected, conditioned.fingerprint)
    return GenerateFacts(
        pairs=files,
        statistics=statistics,
        policy=policy,
        policy_commit=model_commit(policy),
        prompts_commit=prompts.commit,
        rows_per_block=conditioned.rows_per_block,
        chosen_by=conditioned.chosen_by,
        gpus=most_gpus(engines.request),
        quarantined=quarantined(stage),
    )


def _pairs_of(sampled: ray.data.Dataset, stage: Stage) -> ray.data.Dataset:
    """The pairs of sampled blocks: matched against mismatched responses, or the best against the worst by a reward."""
    config = stage.config
    of_round: dict[str, Any] = {"seed": config.seed, "round_index": stage.round.number, "filters": config.filters}
    if config.preference.is_mipo:
        assemble = functools.partial(assemble_pairs, generation=config.generation, **of_round)
    else:
        sampled = add_rewards(sampled, config, stage.events)
        assemble = functools.partial(choose_pairs, **of_round)
    return map_blocks(sampled, _assemble_and_tell, assemble=assemble, events=stage.events)


def _assemble_and_tell(block: pa.Table, *, assemble: Callable[[pa.Table], pa.Table], events: Events) -> pa.Table:
    """The pairs of a block; tells how many of them were kept."""
    pairs = assemble(block)
    kept = pc.sum(pc.equal(pairs["dropped"], "")).as_py() or 0
    events.tell({"event": "assembled", "pairs": pairs.num_rows, "kept": kept})
    return pairs


def count_pairs(stage: Stage, expected: int, fingerprint: str) -> tuple[list[str], PairStatistics]:
    """The files of pairs that were written, and their statistics, which it sends as events too.

    expected, fingerprint: how many rows there are to be, and of which prompts. Raises RuntimeError where they are
    others, and TooManyDroppedError when more than `filters.max_dropped_share` of the rows were dropped.
    """
    files = stage.run.list_parquet(stage.directory)
    statistics = _statistics(stage, files)
    if statistics.fingerprint != fingerprint or statistics.rows != expected:
        raise RuntimeError(
            f"{stage.directory}: the written pairs do not cover the prompts exactly once: expected {expected} rows, "
            f"found {statistics.rows}. Remove {stage.path()} to generate again."
        )
    check_dropped(statistics, stage.directory, stage.config)
    for reason, dropped in statistics.dropped.items():
        stage.events.emit({"event": "dropped", "reason": reason, "dropped_pairs": dropped})
    stage.events.emit({"event": "pairs", **_numbers(statistics)})
    return files, statistics


def _statistics(stage: Stage, files: list[str]) -> PairStatistics:
    pairs = read_rows([stage.path(name) for name in files], stage.run.arrow_filesystem())
    parts = pairs.map_batches(_statistics_row, batch_format="pyarrow", batch_size=1024)
    named(parts, f"{stage.directory.replace('/', '_')}_statistics")
    return merge_statistics(json.loads(row["statistics"]) for row in parts.iter_rows())


def _statistics_row(block: pa.Table) -> pa.Table:
    return pa.table({"statistics": [json.dumps(pair_statistics(as_version_2(block)))]})


def _numbers(statistics: PairStatistics) -> dict[str, float]:
    return {name: value for name, value in vars(statistics).items() if isinstance(value, int | float)}
