"""The judge stages: a judge compares, or rates, the held-out answers that the evaluate stages have sampled.

    answers, prompts -> one row per judgement -> vLLM pool or endpoint -> verdicts -> Parquet -> metrics

STAGE/judge/PROTOCOL/ holds a row per judgement (JUDGEMENT_SCHEMA) and the manifest with the metrics, written last.
Nothing is sampled from a policy again. A stage that was stopped goes on with the judgements that are missing.
"""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.rows import held_out_clusters
from mipo_ray.evaluation.intervals import BOOTSTRAP_SAMPLES
from mipo_ray.evaluation.judge.requests import Judged, write_requests
from mipo_ray.evaluation.judge.rows import (
    JUDGEMENT_SCHEMA,
    judged_protocols,
    refuse_other_definition,
)
from mipo_ray.evaluation.judge.scores import (
    Judgement,
    check_readable,
    describe_judgement,
    pairwise_metrics,
    pointwise_metrics,
)
from mipo_ray.generation.engine import DEFAULT_SAMPLING, Sampling
from mipo_ray.generation.sampler import Engines, sample_responses
from mipo_ray.generation.vllm_arguments import EngineSettings
from mipo_ray.judge.endpoint import EndpointJudge, check_endpoint, endpoint_key, map_endpoint
from mipo_ray.judge.prompts import judge_chat
from mipo_ray.judge.verdicts import pairwise_verdict, pointwise_rating
from mipo_ray.monitoring.progress import progress
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.ray_cluster.blocks import map_blocks, named, resumed_context
from mipo_ray.ray_cluster.resources import Resources, engine_request, judge_resources
from mipo_ray.ray_cluster.tables import read_rows, write_rows
from mipo_ray.session import Session
from mipo_ray.storage.entries import Entries, Evaluated
from mipo_ray.storage.manifests import NOTES, JudgeFacts
from mipo_ray.storage.results import write_evaluation
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table

# The grain of resume, and what keeps an engine or a server busy: several blocks are under way at the same time.
ROWS_PER_BLOCK = 16


def reach_judge(judge: JudgeConfig) -> None:
    """Raises UserError when the judge's endpoint, where there is one, does not answer or does not serve the judge."""
    if judge.endpoint is not None:
        check_endpoint(judge)


def judge_policy(session: Session, round: Round, held_out: PromptSummary) -> None:
    """Judges the held-out answers of a policy by every configured protocol that it has not been judged by.

    `held_out` are the checked held-out prompts. The base is rated but not compared with itself. The policy must have
    been evaluated, and the base judged before.
    Raises UserError for a judge that cannot be read, cannot be reached, or is not the one that finished work was judged
    by.
    """
    for protocol in judged_protocols(session.config.evaluate.judge, round):
        refuse_other_definition(session.config, session.run, round, protocol)
        judged = Judged(session.stage(round, f"judge/{protocol}"), protocol, held_out)
        if judged.stage.finished_before(JudgeFacts) is None:
            with judged.stage.reported() as report:
                facts = _judge(judged)
                report.commit(judged.stage, facts, files=session.run.list_parquet(judged.stage.directory))
                report.closing = f": {describe_judgement(facts.evaluation.metrics)}"
        write_evaluation(session.run)


def _judge(judged: Judged) -> JudgeFacts:
    """Runs one protocol over one policy; returns the facts of the manifest."""
    judge, stage, run, protocol = judged.judge, judged.stage, judged.stage.run, judged.protocol
    definition = judged.definition
    expected = write_requests(judged)
    label = f"{stage.round.label}  {protocol}"
    # Files alone do not tell: a kill in the middle of a write leaves some that Ray Data removes when it goes on.
    if run.read_text(f"{stage.directory}/judged.txt") is None:
        with progress(stage.events, protocol, "rows", expected):
            _ask(judged)
        run.write_text(f"{stage.directory}/judged.txt", f"{expected} judgements\n")
    rows = _judgements(run, stage.directory)
    if len(rows) != expected or len({row["judgement_id"] for row in rows}) != expected:
        raise RuntimeError(
            f"{stage.directory}: the written judgements do not cover the answers exactly once: expected {expected}, "
            f"found {len(rows)}. Remove {stage.path()} to judge again."
        )
    judgements = [as_judgement(row) for row in rows]
    texts = [row["judgement"] for row in rows]
    check_readable(judgements, texts, f"{label} by {judge.name}", stage.path())
    metrics = _metrics(judged, judgements)
    evaluation = Evaluated(
        kind="judge",
        version=definition.version,
        prompt_hash=definition.prompt_hash,
        prompt=definition.prompt,
        judge=judge.model,  # by its name alone: where it ran may differ from policy to policy
        metric="net_win" if protocol == "pairwise" else "rating",
        metrics=metrics,
    )
    values = {f"{protocol}_{name}": entry.value for name, entry in metrics.items()}
    stage.events.emit({"event": "judged", "judgements": expected, **values})
    return JudgeFacts(
        **vars(definition),
        name=f"judge_{protocol}",
        endpoint=judge.endpoint,
        judgements=expected,
        evaluation=evaluation,
    )


def _metrics(judged: Judged, judgements: list[Judgement]) -> Entries:
    stage, config = judged.stage, judged.stage.config
    clusters = held_out_clusters(stage.run)
    bootstrap: Any = {"samples": BOOTSTRAP_SAMPLES, "seed": config.seed, "clusters": clusters}
    if judged.protocol == "pairwise":
        return pairwise_metrics(judgements, **bootstrap)
    base = None
    if not stage.round.is_base:
        base = [as_judgement(row) for row in _judgements(stage.run, stage.run.stage(BASE, stage.name))]
    return pointwise_metrics(judgements, base, **bootstrap)


def _ask(judged: Judged) -> None:
    """Asks the judge for what has no judgement yet, and writes what it said beside what was read from it."""
    stage, judge = judged.stage, judged.judge
    filesystem = stage.run.arrow_filesystem()
    with resumed_context(stage.path(NOTES), filesystem, id_column="judgement_id"):
        rows = read_rows(stage.path("requests"), filesystem)
        rows = rows.repartition(target_num_rows_per_block=ROWS_PER_BLOCK, strict=True)
        if judge.has_own_engines:
            parameters = SamplingConfig(temperature=judge.temperature, max_tokens=judge.max_tokens)
            engines = judge_engines(stage.config, stage.session.resources)
            answers = sample_responses(rows, engines, Sampling({DEFAULT_SAMPLING: parameters}), stage.events)
        else:
            arguments = (judge, endpoint_key(judge), stage.events)
            answers = map_endpoint(rows, EndpointJudge, arguments, judge, ROWS_PER_BLOCK)
        judgements = map_blocks(answers, read_judgements, protocol=judged.protocol)
        write_rows(named(judgements, stage.directory.replace("/", "_")), stage.path(), filesystem)


def judge_engines(config: Config, resources: Resources) -> Engines:
    """The judge's own engines, as many as those of the policy and in their places; `resources` are the policy's."""
    judge, pool = config.evaluate.judge, config.generation.pool
    own = judge_resources(config, resources)
    settings = EngineSettings(
        model_path=str(judge.model),
        dtype=own.dtype,
        max_model_len=judge.max_model_len,
        trust_remote_code=judge.trust_remote_code,
        tensor_parallel_size=judge.tensor_parallel_size or pool.tensor_parallel_size,
        on_gpu=own.on_gpu,
        engine_args=judge.engine_args,
        chat=judge_chat(config),
        stall_minutes=config.generation.stall_minutes,
    )
    return Engines(settings, engine_request(config, own), pool, config.ray.wait_timeout_minutes)


def read_judgements(block: pa.Table, *, protocol: Protocol) -> pa.Table:
    """A block as the judge left it -> JUDGEMENT_SCHEMA, with `parsed` read from the judge's text."""
    rows = block.to_pylist()
    for row in rows:
        if "responses" in row:
            response = row["responses"][0]
            row["judgement"], row["finish_reason"] = response["text"], response["finish_reason"]
            row["tokens"] = len(response["token_ids"])
        parsed = pairwise_verdict(row["judgement"]) if protocol == "pairwise" else pointwise_rating(row["judgement"])
        row["parsed"] = None if parsed is None else str(parsed)
    return pa.Table.from_pylist(rows, schema=JUDGEMENT_SCHEMA)


def as_judgement(row: dict[str, Any]) -> Judgement:
    """A row of JUDGEMENT_SCHEMA as what figures are made of."""
    return Judgement(row["prompt_id"], row["sample"], row["order"], row["parsed"])


def _judgements(run: RunDirectory, stage: str) -> list[dict[str, Any]]:
    """The judgements of a stage that are written by now, in the order of their ids; held-out sets are small."""
    files = [run.path(stage, name) for name in run.list_parquet(stage)]
    if not files:
        return []
    columns = ["judgement_id", "prompt_id", "sample", "order", "judgement", "parsed"]
    table = open_table(files, run.arrow_filesystem(), columns).to_table(columns=columns)
    return table.sort_by("judgement_id").to_pylist()
