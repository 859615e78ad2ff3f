"""The judge stages: a judge compares, or rates, the held-out answers that the evaluate stages have sampled.

    answers, prompts -> one row per judgement -> vLLM pool or endpoint -> verdicts -> Parquet -> metrics

STAGE/judge/PROTOCOL/ holds a row per judgement (JUDGEMENT_SCHEMA) and the manifest with the metrics, written last.
Nothing is sampled from a policy again. A stage that was stopped goes on with the judgements that are missing.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.judge import JudgeConfig, Protocol
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.judge.endpoint import EndpointJudge, check_endpoint, endpoint_key
from mipo_ray.evaluation.judge.prompts import judge_prompt
from mipo_ray.evaluation.judge.rows import (
    JUDGEMENT_SCHEMA,
    definition,
    judged_protocols,
    judgement_rows,
    refuse_other_definition,
)
from mipo_ray.evaluation.judge.scores import (
    Judgement,
    Metrics,
    check_readable,
    describe_judgement,
    pairwise_metrics,
    pointwise_metrics,
)
from mipo_ray.evaluation.judge.verdicts import pairwise_verdict, pointwise_rating
from mipo_ray.generation.pipeline import Engines, sample_responses
from mipo_ray.generation.rendering import fits, load_tokenizer, render_prompts
from mipo_ray.generation.sampler import DEFAULT_SAMPLING, REQUESTS
from mipo_ray.generation.vllm_arguments import EngineSettings
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import progress
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.resources import Resources, engine_request, judge_resources
from mipo_ray.ray_cluster.tables import read_rows, resumable
from mipo_ray.seeds import stable_seed
from mipo_ray.session import Session, Stage
from mipo_ray.storage.results import write_evaluation
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables import open_table

# The grain of resume, and what keeps an engine or a server busy: several blocks are under way at the same time.
ROWS_PER_BLOCK = 16


def reach_judge(judge: JudgeConfig) -> None:
    """Raises UserError when the judge's endpoint, where there is one, does not answer or does not serve the judge."""
    if judge.endpoint is not None:
        check_endpoint(judge)


def judge_policy(session: Session, round: Round) -> None:
    """Judges the held-out answers of a policy by every configured protocol that it has not been judged by.

    The base is rated but not compared with itself. The policy must have been evaluated, and the base judged before.
    Raises UserError for a judge that cannot be read, cannot be reached, or is not the one that finished work was judged
    by.
    """
    for protocol in judged_protocols(session.config.evaluate.judge, round):
        refuse_other_definition(session.config, session.run, round, protocol)
        judged = Judged(session.stage(round, f"judge/{protocol}"), protocol)
        if judged.stage.finished_before() is None:
            with judged.stage.reported() as report:
                manifest = report.commit(judged.stage, _judge(judged))
                report.closing = f": {describe_judgement(manifest['evaluation']['metrics'])}"
        write_evaluation(session.run)


@dataclass(frozen=True)
class Judged:
    """One protocol over one policy: its stage, and what decides about its judgements."""

    stage: Stage
    protocol: Protocol

    @property
    def judge(self) -> JudgeConfig:
        return self.stage.config.evaluate.judge

    @property
    def definition(self) -> dict[str, Any]:
        return definition(self.stage.config, self.stage.run, self.stage.round, self.protocol)


def _judge(judged: Judged) -> dict[str, Any]:
    """Runs one protocol over one policy; returns the facts of the manifest."""
    judge, stage, run, protocol = judged.judge, judged.stage, judged.stage.run, judged.protocol
    facts = judged.definition
    expected = _write_requests(judged)
    label = f"{stage.round.label}  {protocol}"
    # Files alone do not tell: a kill in the middle of a write leaves some that Ray Data removes when it goes on.
    if run.read_text(f"{stage.directory}/judged.txt") is None:
        with progress(stage.events, "generated", "rows", label, total=expected):
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
    check_readable(judgements, texts, judge.max_unreadable_share, f"{label} by {judge.name}", stage.path())
    metrics = _metrics(judged, judgements)
    evaluation = {
        "kind": "judge",
        **{name: facts[name] for name in ("version", "prompt_hash", "prompt")},
        # By its name alone: where it ran may differ from policy to policy.
        "judge": judge.model,
        "metric": "net_win" if protocol == "pairwise" else "rating",
        "metrics": metrics,
    }
    values = {f"{protocol}_{name}": entry["value"] for name, entry in metrics.items()}
    stage.events.emit({"event": "judged", "judgements": expected, **values})
    return {
        **facts,
        "name": f"judge_{protocol}",
        "endpoint": judge.endpoint,
        "judgements": expected,
        "evaluation": evaluation,
        "files": run.list_parquet(stage.directory),
    }


def _metrics(judged: Judged, judgements: list[Judgement]) -> Metrics:
    stage, config = judged.stage, judged.stage.config
    bootstrap: dict[str, int] = {"samples": config.evaluate.bootstrap_samples, "seed": config.seed}
    if judged.protocol == "pairwise":
        return pairwise_metrics(judgements, **bootstrap)
    base = None
    if not stage.round.is_base:
        base = [as_judgement(row) for row in _judgements(stage.run, stage.run.stage(BASE, stage.name))]
    return pointwise_metrics(judgements, base, **bootstrap)


def _write_requests(judged: Judged) -> int:
    """Writes requests/, what the judge is to be asked, once; returns how many judgements there are to be."""
    stage, judge, facts = judged.stage, judged.judge, judged.definition
    config, run = stage.config, stage.run
    stored = stored_requests(run, stage.directory, facts, own_engines=judge.has_own_engines)
    if stored is not None:
        return stored
    table = judgement_rows(config, run, stage.round, judge_prompt(judge, judged.protocol))
    with ordered_context():
        rows: ray.data.Dataset = ray.data.from_arrow(table)
        if judge.has_own_engines:
            rows = map_blocks(rows, _add_requests, judge=judge, seed=config.seed)
        named(rows, f"{stage.directory.replace('/', '_')}_requests").write_parquet(
            stage.path("requests"), filesystem=run.arrow_filesystem()
        )
    note_requests(run, stage.directory, facts, judgements=table.num_rows, own_engines=judge.has_own_engines)
    return table.num_rows


def stored_requests(run: RunDirectory, stage: str, facts: dict[str, Any], *, own_engines: bool) -> int | None:
    """How many judgements the stored requests ask for; None where they are to be written.

    Requests and judgements of another definition, of a stage that was never finished, are removed. Those of a judge
    that ran elsewhere are its own: only engines of this run need token ids, so that its requests alone are removed.
    """
    before = json.loads(run.read_text(f"{stage}/requests.json") or "{}")
    if before.get("definition") != facts:
        run.remove(stage)
        return None
    if before.get("own_engines") is own_engines:
        return int(before["judgements"])
    # First that they are no longer whole: a kill may come before they are written again.
    note_requests(run, stage, facts, judgements=before["judgements"], own_engines=None)
    run.remove(f"{stage}/requests")
    return None


def note_requests(
    run: RunDirectory, stage: str, facts: dict[str, Any], *, judgements: int, own_engines: bool | None
) -> None:
    """Notes by which definition requests/ was written, and whether for engines of this run; None: for neither yet."""
    noted = {"definition": facts, "judgements": judgements, "own_engines": own_engines}
    run.write_text(f"{stage}/requests.json", json.dumps(noted))


def _ask(judged: Judged) -> None:
    """Asks the judge for what has no judgement yet, and writes what it said beside what was read from it."""
    stage, judge = judged.stage, judged.judge
    filesystem = stage.run.arrow_filesystem()
    with ordered_context() as context:
        context.checkpoint_config = resumable("judgement_id", stage.path("checkpoint"), filesystem)
        rows = read_rows(stage.path("requests"), filesystem)
        rows = rows.repartition(target_num_rows_per_block=ROWS_PER_BLOCK, strict=True)
        if judge.has_own_engines:
            sampling = SamplingConfig(temperature=judge.temperature, max_tokens=judge.max_tokens)
            engines = judge_engines(stage.config, stage.session.resources)
            answers = sample_responses(rows, engines, {DEFAULT_SAMPLING: sampling}, stage.events)
        else:
            answers = _ask_endpoint(rows, judge, stage.events)
        judgements = map_blocks(answers, read_judgements, protocol=judged.protocol)
        named(judgements, stage.directory.replace("/", "_")).write_parquet(stage.path(), filesystem=filesystem)


def _ask_endpoint(rows: ray.data.Dataset, judge: JudgeConfig, events: Events) -> ray.data.Dataset:
    """One actor beside the driver, where localhost and the environment are what the user meant."""
    blocks = -(-judge.max_concurrent_requests // ROWS_PER_BLOCK) + 1
    here = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    return rows.map_batches(
        EndpointJudge,
        fn_constructor_args=(judge, endpoint_key(judge), events),
        batch_format="pyarrow",
        batch_size=None,
        compute=ActorPoolStrategy(
            size=1, max_tasks_in_flight_per_actor=2 * blocks, max_concurrent_calls_per_actor=blocks
        ),
        num_cpus=0,
        scheduling_strategy=here,
    )


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
    )
    return Engines(settings, engine_request(config, own), pool, config.ray.wait_timeout_minutes)


def _add_requests(block: pa.Table, *, judge: JudgeConfig, seed: int) -> pa.Table:
    """Adds `requests` (sampler.REQUESTS). Raises UserError for a prompt that leaves no room for the judgement."""
    tokenizer = load_tokenizer(str(judge.model), judge.trust_remote_code)
    conversations = [[{"role": "user", "content": text}] for text in block["prompt"].to_pylist()]
    requests = []
    for row, ids in zip(
        block.select(["judgement_id", "prompt_id"]).to_pylist(), render_prompts(tokenizer, conversations), strict=True
    ):
        if not fits(ids, max_tokens=judge.max_tokens, max_model_len=judge.max_model_len):
            raise UserError(
                f"prompt {row['prompt_id']!r}: {len(ids)} tokens of the judge's prompt and a judgement of up to "
                f"{judge.max_tokens} do not fit the judge's window: expected at most "
                f"{judge.max_model_len - judge.max_tokens} prompt tokens (evaluate.judge.max_model_len "
                f"{judge.max_model_len} - evaluate.judge.max_tokens {judge.max_tokens}). Raise max_model_len, or lower "
                "max_tokens."
            )
        seed_of_row = stable_seed("judge", seed, row["judgement_id"]) % 2**31
        requests.append([{"prompt_token_ids": ids, "seed": seed_of_row}])
    return block.append_column("requests", pa.array(requests, REQUESTS))


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
