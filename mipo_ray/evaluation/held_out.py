"""The evaluate stage: sample from a policy on held-out prompts, score what it said, and measure.

Before round 0 the base is measured and three things are fixed for the whole run: which K other conditionings each
held-out prompt is compared with, and the held-out pairs (the base's matched and mismatched responses).
"""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.dataset
import ray.data
from ray.data import ActorPoolStrategy

from mipo_ray.blocks import map_blocks, ordered_context
from mipo_ray.conditioning import condition_block
from mipo_ray.config import Config
from mipo_ray.evaluation.other_conditionings import other_conditionings
from mipo_ray.evaluation.results import MeasuredRows
from mipo_ray.evaluation.scoring import SCORING_COLUMNS, Scorer, ScorerSettings
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.pipeline import sample_responses
from mipo_ray.generation.rendering import check_length, load_tokenizer, render_prompts
from mipo_ray.monitoring import Events, progress
from mipo_ray.pairs import TOKEN_IDS, prompt_text
from mipo_ray.prompt_check import check_held_out
from mipo_ray.prompts import blocks_of, read_prompts
from mipo_ray.resources import Resources
from mipo_ray.seeds import stable_seed
from mipo_ray.storage import RunDirectory

# Held-out prompts are compared with each other inside blocks of this size; a held-out set is usually one block.
HELD_OUT_BLOCK = 256

RESPONSE_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("context", pa.string()),
        ("source", pa.string()),
        ("kind", pa.string()),
        ("sample", pa.int32()),
        ("response", pa.string()),
        ("finish_reason", pa.string()),
        ("tokens", pa.int32()),
        *SCORING_COLUMNS,
    ]
)


def measure_policy(
    config: Config,
    run: RunDirectory,
    round_index: int | None,
    *,
    policy: str,
    initial: str,
    resources: Resources,
    events: Events,
) -> dict[str, Any]:
    """Samples and scores a policy on the held-out prompts; writes responses/ and scores/ below its evaluate stage.

    round None measures the base, and must come first: it fixes the held-out conditionings and pairs.
    """
    stage = run.stage(round_index, "evaluate")
    base = run.stage(None, "evaluate")
    filesystem = run.arrow_filesystem()
    run.remove(stage)
    if round_index is None:
        prepare_held_out(config, run, initial=initial)

    models = {"initial": initial} if round_index is None else {"initial": initial, "policy": policy}
    label = "base   " if round_index is None else f"round {round_index}"
    rows = ray.data.read_parquet(run.path(base, "prompts"), filesystem=filesystem)
    prompts = rows.count()
    with ordered_context():
        rows = map_blocks(rows, _answer_requests, config=config, round_index=round_index)
        rows = rows.repartition(target_num_rows_per_block=8)  # several blocks in flight, several engines at work
        sampled = sample_responses(rows, config, policy=policy, resources=resources, events=events)
        answers = map_blocks(
            sampled, _one_row_per_response, samples=config.evaluate.samples_per_prompt, models=list(models)
        )
        with progress(events, "generated", "rows", f"{label}  answer", total=prompts):
            answers.write_parquet(run.path(stage, "responses"), filesystem=filesystem)

    with ordered_context():
        answers = ray.data.read_parquet(run.path(stage, "responses"), filesystem=filesystem)
        if round_index is not None:
            # The fixed held-out pairs: the initial model's log-probs of them are known from the base's stage.
            pairs = ray.data.read_parquet(run.path(base, "responses"), filesystem=filesystem)
            pairs = map_blocks(pairs, _pairs_only)
            answers = answers.union(pairs)
        scores = answers.repartition(target_num_rows_per_block=16).map_batches(
            Scorer,
            fn_constructor_args=(
                ScorerSettings(
                    models=models,
                    dtype=resources.dtype,
                    batch_size=config.evaluate.scoring_batch_size,
                    on_gpu=resources.on_gpu,
                    trust_remote_code=config.model.trust_remote_code,
                ),
                events,
            ),
            batch_format="pyarrow",
            batch_size=None,
            compute=ActorPoolStrategy(min_size=1, max_size=config.evaluate.scorers),
            num_cpus=config.generation.pool.cpus_per_engine,
            num_gpus=resources.gpus_per_engine or None,
        )
        # An answer each, and the held-out pairs: rejected ones for the base, both sides for a round's policy.
        total = prompts * (config.evaluate.samples_per_prompt + (1 if round_index is None else 2))
        with progress(events, "scored", "scored_responses", f"{label}  score", total=total):
            scores.write_parquet(run.path(stage, "scores"), filesystem=filesystem)
    return {"policy": policy, "responses": len(measured_rows(run, round_index).prompt_ids)}


def prepare_held_out(config: Config, run: RunDirectory, *, initial: str) -> None:
    """Writes base/evaluate/prompts: every held-out prompt with its K other conditionings and its mismatched prompt."""
    strategy = "missing_context" if config.conditioning.strategy == "missing_context" else "random_prompt"
    summary = check_held_out(config)
    with ordered_context():
        rows = blocks_of(read_prompts(config.evaluate.prompts, summary), summary.rows, HELD_OUT_BLOCK)
        rows = map_blocks(rows, condition_block, strategy=strategy, seed=config.seed, round_index=-1)
        rows = map_blocks(rows, _add_conditionings, config=config, initial=initial)
        rows.write_parquet(
            run.path(run.stage(None, "evaluate"), "prompts"), filesystem=run.arrow_filesystem(), min_rows_per_file=4096
        )


def _add_conditionings(block: pa.Table, *, config: Config, initial: str) -> pa.Table:
    """Token ids of what each row's answers are sampled and scored under."""
    tokenizer = load_tokenizer(initial, config.model.trust_remote_code)
    rows = block.to_pylist()
    others = other_conditionings(rows, config.evaluate.prompts, config.evaluate.other_prompts, seed=config.seed)
    own = render_prompts(tokenizer, [row["messages"] for row in rows])
    for row, token_ids in zip(rows, own, strict=True):
        check_length(
            row["prompt_id"],
            token_ids,
            max_tokens=config.generation.sampling.max_tokens,
            max_model_len=config.model.max_model_len,
        )
    without_context = [
        render_prompts(tokenizer, [row["question_messages"]])[0] if row["context"] else [] for row in rows
    ]
    columns = {
        "prompt_id": block["prompt_id"],
        "context": block["context"],
        "source": pa.array([prompt_text(row["messages"]) for row in rows], pa.string()),
        "prompt_token_ids": pa.array(own, TOKEN_IDS),
        "other_token_ids": pa.array([render_prompts(tokenizer, messages) for messages in others], pa.list_(TOKEN_IDS)),
        "without_context_token_ids": pa.array(without_context, TOKEN_IDS),
        # Empty where a row has no mismatched prompt: such a row is measured, but gives no held-out pair.
        "mismatched_token_ids": pa.array(
            [[] if row["dropped"] else render_prompts(tokenizer, [row["mismatched_messages"]])[0] for row in rows],
            TOKEN_IDS,
        ),
    }
    return pa.table(columns)


def _answer_requests(block: pa.Table, *, config: Config, round_index: int | None) -> pa.Table:
    """Requests for the answers of one policy; for the base also one mismatched response, the rejected of the pair."""
    requests = []
    for row in block.select(["prompt_id", "prompt_token_ids", "mismatched_token_ids"]).to_pylist():
        # The same seeds for every policy: what differs between two policies' answers is the policies.
        seeds = [
            stable_seed(config.seed, "held-out", row["prompt_id"], sample) % 2**31
            for sample in range(config.evaluate.samples_per_prompt + 1)
        ]
        own = [{"prompt_token_ids": row["prompt_token_ids"], "seed": seed} for seed in seeds[:-1]]
        if round_index is None and row["mismatched_token_ids"]:
            own.append({"prompt_token_ids": row["mismatched_token_ids"], "seed": seeds[-1]})
        requests.append(own)
    return block.append_column("requests", pa.array(requests, REQUESTS))


def _one_row_per_response(block: pa.Table, *, samples: int, models: list[str]) -> pa.Table:
    """One row per sampled response, with what it is to be scored under: own prompt, K others, without the context.

    kind `answer` is measured; `rejected` (base only) is the rejected response of the row's held-out pair, whose chosen
    one is answer 0.
    """
    flat = []
    for row in block.to_pylist():
        own = row["prompt_token_ids"]
        compared = [own, *row["other_token_ids"]]
        if row["without_context_token_ids"]:
            compared.append(row["without_context_token_ids"])
        for sample, response in enumerate(row["responses"]):
            is_answer = sample < samples
            flat.append(
                {
                    **{name: row[name] for name in ("prompt_id", "context", "source")},
                    "kind": "answer" if is_answer else "rejected",
                    "sample": sample if is_answer else 0,
                    "response": response["text"],
                    "finish_reason": response["finish_reason"],
                    "tokens": len(response["token_ids"]),
                    "response_token_ids": response["token_ids"],
                    "conditionings": compared if is_answer else [own],
                    "models": models,
                }
            )
    return pa.Table.from_pylist(flat, schema=RESPONSE_SCHEMA)


def _pairs_only(block: pa.Table) -> pa.Table:
    """The held-out pairs among the base's responses, to be scored by the policy under their own prompt."""
    pairs = [
        {
            **row,
            "kind": "pair_rejected" if row["kind"] == "rejected" else "pair_chosen",
            "conditionings": row["conditionings"][:1],
            "models": ["policy"],
        }
        for row in block.to_pylist()
        if row["kind"] == "rejected" or row["sample"] == 0
    ]
    return pa.Table.from_pylist(pairs, schema=RESPONSE_SCHEMA)


def measured_rows(run: RunDirectory, round_index: int | None) -> MeasuredRows:
    """What `results.measure` takes, read from a policy's scores (and, for the held-out pairs, the base's)."""
    answers = _read_scores(run, round_index, "answer")
    initial = _split(answers["logprobs_initial"], answers["context"])
    policy = initial if round_index is None else _split(answers["logprobs_policy"], answers["context"])

    base_chosen = {
        row["prompt_id"]: row["logprobs_initial"][0]
        for row in _rows(_read_scores(run, None, "answer"))
        if row["sample"] == 0
    }
    base_rejected = {row["prompt_id"]: row["logprobs_initial"][0] for row in _rows(_read_scores(run, None, "rejected"))}
    pair_ids = sorted(base_rejected)
    pair_initial = [np.asarray([side[key] for key in pair_ids]) for side in (base_chosen, base_rejected)]
    pair_policy = pair_initial
    if round_index is not None:
        pair_policy = []
        for kind in ("pair_chosen", "pair_rejected"):
            scored = {
                row["prompt_id"]: row["logprobs_policy"][0] for row in _rows(_read_scores(run, round_index, kind))
            }
            pair_policy.append(np.asarray([scored[key] for key in pair_ids]))
    return MeasuredRows(
        prompt_ids=answers["prompt_id"],
        responses=answers["response"],
        sources=answers["source"],
        token_counts=np.asarray(answers["tokens"]),
        truncated=np.asarray([reason == "length" for reason in answers["finish_reason"]]),
        initial_own=initial[0],
        initial_others=initial[1],
        initial_none=initial[2],
        policy_own=policy[0],
        policy_others=policy[1],
        policy_none=policy[2],
        pair_prompt_ids=pair_ids,
        pair_policy_chosen=pair_policy[0],
        pair_policy_rejected=pair_policy[1],
        pair_initial_chosen=pair_initial[0],
        pair_initial_rejected=pair_initial[1],
    )


def _read_scores(run: RunDirectory, round_index: int | None, kind: str) -> dict[str, list[Any]]:
    """The scores of one kind as columns, in the order of prompt and sample. Held-out sets are small: they fit here."""
    scores = pyarrow.dataset.dataset(
        run.path(run.stage(round_index, "evaluate"), "scores"), filesystem=run.arrow_filesystem(), format="parquet"
    )
    table = scores.to_table(filter=pyarrow.dataset.field("kind") == kind)
    return table.sort_by([("prompt_id", "ascending"), ("sample", "ascending")]).to_pydict()


def _rows(columns: dict[str, list[Any]]) -> list[dict[str, Any]]:
    return [dict(zip(columns, values, strict=True)) for values in zip(*columns.values(), strict=True)]


def _split(logprobs: list[list[float]], contexts: list[str]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Own [responses], others [responses, K] and, where any row has a context, without it [responses] (else NaN)."""
    own = np.asarray([values[0] for values in logprobs])
    others = np.asarray(
        [values[1:-1] if context else values[1:] for values, context in zip(logprobs, contexts, strict=True)]
    )
    if not any(contexts):
        return own, others, None
    without = [values[-1] if context else np.nan for values, context in zip(logprobs, contexts, strict=True)]
    return own, others, np.asarray(without)
