"""The evaluate stage: sample from a policy on held-out prompts, score what it said, and measure.

Before round 0 the base is measured and three things are fixed for the whole run: which K other conditionings each
held-out prompt is compared with, and the held-out pairs (the base's matched and mismatched responses).
"""

from __future__ import annotations

import functools
import json
from typing import Any

import pyarrow as pa
import ray.data

from mipo_ray.conditioning.blocks import condition_block, rows_per_block
from mipo_ray.conditioning.strategies import STRATEGIES
from mipo_ray.config.conditioning import ConditioningConfig
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.conditionings import (
    OTHER,
    OWN,
    WITHOUT_CONTEXT,
    by_conditioning,
    matrix_id,
    other_conditionings,
    refuse_equal_prompts,
)
from mipo_ray.evaluation.held_out.copies import COPIED_TOKENS, mark_copies
from mipo_ray.evaluation.held_out.matrix import (
    LOOKED_AT,
    MATRIX_FILE,
    MatrixRows,
    matrix_conditionings,
    read_matrix_rows,
    render_matrix,
)
from mipo_ray.evaluation.held_out.scorer import SAMPLER_LOGPROB, SCORING_COLUMNS
from mipo_ray.evaluation.held_out.scorers import score_blocks
from mipo_ray.generation.engine import DEFAULT_SAMPLING, REQUESTS, Sampling
from mipo_ray.generation.rendering import check_length, fits, load_tokenizer, render_prompts
from mipo_ray.generation.sampler import round_engines, sample_responses
from mipo_ray.monitoring.progress import progress
from mipo_ray.pairs.filters import prompt_text
from mipo_ray.pairs.schema import TOKEN_IDS
from mipo_ray.prompts.check import PromptSummary
from mipo_ray.prompts.clusters import question_of, user_of
from mipo_ray.prompts.dataset import blocks_of, read_prompts
from mipo_ray.ray_cluster.blocks import map_blocks, named, ordered_context
from mipo_ray.ray_cluster.tables import read_rows, write_rows
from mipo_ray.seeds import stable_seed
from mipo_ray.session import Stage
from mipo_ray.storage.records import to_json
from mipo_ray.storage.rounds import BASE
from mipo_ray.tables.parquet import open_table

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
        ("answer_tokens", pa.int32()),  # of these behind the thoughts
        COPIED_TOKENS,
        ("conditioning_ids", pa.list_(pa.string())),
        *SCORING_COLUMNS,
        SAMPLER_LOGPROB,
    ]
)


def measure_policy(stage: Stage, held_out: PromptSummary) -> None:
    """Samples and scores a policy on the held-out prompts; writes responses/ and scores/ below its evaluate stage.

    The base comes first: it fixes the held-out conditionings and pairs.
    """
    config, round, session = stage.config, stage.round, stage.session
    base = session.stage(BASE, "evaluate")
    filesystem = stage.run.arrow_filesystem()
    stage.run.remove(stage.directory)
    if round.is_base:
        prepare_held_out(stage, held_out)

    policy = session.policy(round)
    models = {"initial": config.model.source} | ({} if round.is_base else {"policy": policy})
    rows = read_rows(base.path("prompts"), filesystem)
    prompts = open_table(base.path("prompts"), filesystem).count_rows()
    matrix = read_matrix_rows(stage.run, base.directory)
    with ordered_context():
        rows = map_blocks(rows, _answer_requests, config=config, with_rejected=round.is_base)
        rows = rows.repartition(target_num_rows_per_block=8)  # several blocks in flight, several engines at work
        engines = round_engines(session, round)
        sampling = Sampling({DEFAULT_SAMPLING: config.generation.sampling})
        sampled = sample_responses(rows, engines, sampling, stage.events)
        answers = map_blocks(
            sampled,
            _one_row_per_response,
            samples=config.evaluate.samples_per_prompt,
            models=list(models),
            matrix=matrix,
        )
        answers = map_blocks(answers, mark_copies, config=config)
        with progress(stage.events, "answer", "rows", prompts):
            write_rows(named(answers, f"{round.name}_answers"), stage.path("responses"), filesystem)

    with ordered_context():
        answers = read_rows(stage.path("responses"), filesystem)
        if not round.is_base:
            # The fixed held-out pairs: the initial model's log-probs of them are known from the base's stage.
            pairs = read_rows(base.path("responses"), filesystem)
            pairs = map_blocks(pairs, _pairs_only)
            answers = answers.union(pairs)
        # An answer each, and the held-out pairs: rejected ones for the base, both sides for a round's policy.
        total = prompts * (config.evaluate.samples_per_prompt + (1 if round.is_base else 2))
        total += sum(len(part.prompt_ids) for part in matrix.values())
        with progress(stage.events, "score", "responses", total):
            scores = named(_scored(answers, total, stage, models), f"{round.name}_scores")
            write_rows(scores, stage.path("scores"), filesystem)


def _scored(answers: ray.data.Dataset, count: int, stage: Stage, models: dict[str, str]) -> ray.data.Dataset:
    """The `count` answers with their log-probs by every one of `models`, through a pool of scoring actors.

    Blocks are as large as the pool allows: within one, a prompt goes once through a model for all responses under it.
    """
    block = min(HELD_OUT_BLOCK, -(-count // stage.config.evaluate.scorers))
    return score_blocks(answers.repartition(target_num_rows_per_block=block), models, stage)


def prepare_held_out(stage: Stage, held_out: PromptSummary) -> None:
    """Writes prompts/ below the base's stage: every held-out prompt with its K other conditionings and its mismatched
    prompt. And matrix.json: what the answers to the first M of them are scored under, too.
    """
    config = stage.config
    prompts, initial = config.evaluate.prompts, config.model.source
    with ordered_context():
        read = blocks_of(read_prompts(prompts, held_out), rows_per_block(held_out.rows, HELD_OUT_BLOCK))
        # Kept in Ray's object store, so that the matrix below is made of these very rows and no file is read twice.
        read = named(read, "held_out_rows").materialize()
        rows = map_blocks(
            read,
            condition_block,
            conditioning=held_out_conditioning(config.conditioning),
            prompts=prompts,
            seed=config.seed,
            round_index=BASE.number,
        )
        rows = named(map_blocks(rows, _add_conditionings, config=config, initial=initial), "held_out_prompts")
        write_rows(rows, stage.path("prompts"), stage.run.arrow_filesystem(), fewest_in_file=4096)
    matrix = matrix_conditionings(read.take(LOOKED_AT), prompts, config.evaluate.matrix)
    rendered = render_matrix(matrix, load_tokenizer(initial, config.model.trust_remote_code), config.prompts.chat)
    stage.run.write_text(f"{stage.directory}/{MATRIX_FILE}", json.dumps(to_json(rendered)))


def held_out_conditioning(conditioning: ConditioningConfig) -> ConditioningConfig:
    """What held-out pairs are made by: the strategy of the run for context-response MIPO, else `random_prompt`.

    A mixture counts as its heaviest part. The prompt-response strategies all estimate I(Y; X), whose plain negative is
    another prompt; held-out rows are fewer than a block, too few for the neighbours of `similar_prompt`.
    """
    heaviest = max(conditioning.mixture, key=lambda name: conditioning.mixture[name], default=conditioning.strategy)
    needs_context = heaviest != "mixture" and STRATEGIES[heaviest].needs_context
    return ConditioningConfig(strategy=heaviest if needs_context else "random_prompt", fallback="drop")


def _add_conditionings(block: pa.Table, *, config: Config, initial: str) -> pa.Table:
    """Token ids of what each row's answers are sampled and scored under."""
    tokenizer = load_tokenizer(initial, config.model.trust_remote_code)
    render = functools.partial(render_prompts, tokenizer, chat=config.prompts.chat)
    rows = block.to_pylist()
    others = other_conditionings(rows, config.evaluate.prompts, config.evaluate.other_prompts, seed=config.seed)
    own = render([row["messages"] for row in rows])
    window: dict[str, Any] = {
        "max_tokens": config.generation.sampling.max_tokens,
        "max_model_len": config.model.max_model_len,
    }
    for row, token_ids in zip(rows, own, strict=True):
        check_length(row["prompt_id"], token_ids, **window, hint="; held-out prompts are never dropped")
    # Another user's context may be longer than the row's own.
    mismatched = [[] if row["dropped"] else render(row["mismatched_messages"])[0] for row in rows]
    fitting = [fits(ids, **window) and ids != of_row for ids, of_row in zip(mismatched, own, strict=True)]
    without_context = [render([row["question_messages"]])[0] if row["context"] else [] for row in rows]
    compared = [dict(zip(each, render(list(each.values())), strict=True)) for each in others]
    for row, token_ids, by_id, without in zip(rows, own, compared, without_context, strict=True):
        refuse_equal_prompts(row["prompt_id"], token_ids, {**by_id, WITHOUT_CONTEXT: without})
    columns = {
        "prompt_id": block["prompt_id"],
        "context": block["context"],
        # What intervals resample; "" where a row names no user.
        "user": pa.array([user_of(row) for row in rows], pa.string()),
        "question": pa.array([question_of(row) for row in rows], pa.string()),
        # What people call the two.
        "user_label": pa.array([row["group"] or row["context"] for row in rows], pa.string()),
        "question_label": pa.array([row["question_messages"][-1]["content"] for row in rows], pa.string()),
        "source": pa.array([prompt_text(row["messages"], row["context"]) for row in rows], pa.string()),
        "prompt_token_ids": pa.array(own, TOKEN_IDS),
        "other_prompt_ids": pa.array([list(each) for each in others], pa.list_(pa.string())),
        "other_token_ids": pa.array([list(by_id.values()) for by_id in compared], pa.list_(TOKEN_IDS)),
        "without_context_token_ids": pa.array(without_context, TOKEN_IDS),
        # Empty where a row has no mismatched prompt: such a row is measured, but gives no held-out pair.
        "mismatched_token_ids": pa.array(
            [ids if fit else [] for ids, fit in zip(mismatched, fitting, strict=True)], TOKEN_IDS
        ),
    }
    return pa.table(columns)


def _answer_requests(block: pa.Table, *, config: Config, with_rejected: bool) -> pa.Table:
    """Requests for the answers of one policy; with_rejected: also one mismatched response, for the held-out pair."""
    requests = []
    for row in block.select(["prompt_id", "prompt_token_ids", "mismatched_token_ids"]).to_pylist():
        # The same seeds for every policy: what differs between two policies' answers is the policies.
        seeds = [
            stable_seed(config.seed, "held-out", row["prompt_id"], sample) % 2**31
            for sample in range(config.evaluate.samples_per_prompt + 1)
        ]
        own = [{"prompt_token_ids": row["prompt_token_ids"], "seed": seed} for seed in seeds[:-1]]
        if with_rejected and row["mismatched_token_ids"]:
            own.append({"prompt_token_ids": row["mismatched_token_ids"], "seed": seeds[-1]})
        requests.append(own)
    return block.append_column("requests", pa.array(requests, REQUESTS))


def _one_row_per_response(
    block: pa.Table, *, samples: int, models: list[str], matrix: dict[str, MatrixRows]
) -> pa.Table:
    """One row per sampled response, with what it is to be scored under: own prompt, K others, without the context.

    kind `answer` is measured; `rejected` (base only) is the rejected response of the row's held-out pair, whose chosen
    one is answer 0. `matrix_prompts` and `matrix_contexts` are answer 0 again, to be scored under the M conditionings
    of that part of the matrix. They stay rows of their own, though the ids alone would tell them apart: which
    sequences share a forward pass depends on the rows, and the last digits of log-probs depend on that. `mark_copies`
    fills COPIED_TOKENS in.
    """
    crossed = {
        (part_name, prompt_id): {
            matrix_id(part_name, column): token_ids
            for column, token_ids in zip(part.prompt_ids, conditionings, strict=True)
        }
        for part_name, part in matrix.items()
        for prompt_id, conditionings in zip(part.prompt_ids, part.conditionings, strict=True)
    }
    flat = []
    for row in block.to_pylist():
        own = {OWN: row["prompt_token_ids"]}
        compared = own | _others(row)
        if row["without_context_token_ids"]:
            compared[WITHOUT_CONTEXT] = row["without_context_token_ids"]
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
                    "answer_tokens": response.get("answer_tokens"),
                    "response_token_ids": response["token_ids"],
                    # The rejected one was sampled under another prompt than the one that it is scored under.
                    **(_scored_under(compared, response.get("logprob")) if is_answer else _scored_under(own)),
                    "models": models,
                }
            )
            if sample == 0:
                flat += [
                    {**flat[-1], "kind": f"matrix_{part_name}", **_scored_under(conditionings)}
                    for (part_name, prompt_id), conditionings in crossed.items()
                    if prompt_id == row["prompt_id"]
                ]
    return pa.Table.from_pylist(flat, schema=RESPONSE_SCHEMA)


def _others(row: dict[str, Any]) -> dict[str, list[int]]:
    """The other conditionings of a held-out prompt; prompts that an earlier version wrote have theirs without names."""
    token_ids = row["other_token_ids"]
    names = row.get("other_prompt_ids") or range(len(token_ids))
    return {f"{OTHER}{name}": ids for name, ids in zip(names, token_ids, strict=True)}


def _scored_under(conditionings: dict[str, list[int]], sampler_logprob: float | None = None) -> dict[str, Any]:
    """The columns of a row that is to be scored under these conditionings: id -> token ids."""
    ids, prompts = list(conditionings), list(conditionings.values())
    return {"conditioning_ids": ids, "conditionings": prompts, SAMPLER_LOGPROB[0]: sampler_logprob}


def _pairs_only(block: pa.Table) -> pa.Table:
    """The held-out pairs among the base's responses, to be scored by the policy under their own prompt."""
    pairs = [
        {
            **row,
            "kind": "pair_rejected" if row["kind"] == "rejected" else "pair_chosen",
            **_scored_under({OWN: by_conditioning(row, row["conditionings"])[OWN]}),
            "models": ["policy"],
            COPIED_TOKENS[0]: None,  # of what is measured alone
        }
        for row in block.to_pylist()
        if row["kind"] == "rejected" or (row["kind"] == "answer" and row["sample"] == 0)
    ]
    return pa.Table.from_pylist(pairs, schema=RESPONSE_SCHEMA)
