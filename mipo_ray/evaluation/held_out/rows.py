"""Reads what the evaluate stages wrote back as the arrays that `metrics.measure` takes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute
import pyarrow.dataset

from mipo_ray.evaluation.held_out.conditionings import OTHER, OWN, WITHOUT_CONTEXT, by_conditioning
from mipo_ray.evaluation.held_out.copies import COPIED_TOKENS
from mipo_ray.evaluation.held_out.effects import TokenScores
from mipo_ray.evaluation.held_out.gains import Labels
from mipo_ray.evaluation.held_out.metrics import MeasuredRows
from mipo_ray.evaluation.resampling import Clusters
from mipo_ray.pairs.schema import innermost_lists
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table
from mipo_ray.text.thoughts import answer_of

JUDGES = ("initial", "policy")
_TOKENS = "token_logprobs_initial"


@dataclass(frozen=True)
class ScoredResponse:
    """One response and its log-probs, nats: judge ("initial" or "policy") -> conditioning id -> sum over its tokens.

    row: its columns in the table of scores. tokens: by the initial model, of each of its sums the log-probs of the
    response's tokens [tokens]; {} where an earlier version wrote it, and where they were not asked for.
    """

    row: dict[str, Any]
    logprobs: dict[str, dict[str, float]]
    tokens: dict[str, np.ndarray]


# By (prompt_id, sample), in that order.
ScoredResponses = dict[tuple[str, int], ScoredResponse]


def measured_rows(run: RunDirectory, round: Round) -> MeasuredRows:
    """What `metrics.measure` takes, read from a policy's scores (and, for the held-out pairs, the base's)."""
    scores = read_scores(run, round, with_tokens=True)
    base = scores if round.is_base else read_scores(run, BASE)
    answers = list(scores["answer"].values())
    initial = _split(answers, "initial")
    policy = initial if round.is_base else _split(answers, "policy")

    # A held-out pair is what the base said: its first answer, and its rejected response.
    pairs = sorted(base["rejected"])
    sides = (base["answer"], base["rejected"])
    pair_initial = [_under_own(side, pairs, "initial") for side in sides]
    pair_policy = pair_initial
    if not round.is_base:
        pair_policy = [_under_own(scores[side], pairs, "policy") for side in ("pair_chosen", "pair_rejected")]
    prompt_ids = [answer.row["prompt_id"] for answer in answers]
    clusters = held_out_clusters(run)
    tokens = [one for answer in answers if (one := _token_scores(answer)) is not None]
    return MeasuredRows(
        prompt_ids=prompt_ids,
        responses=[answer_of(answer.row["response"]) for answer in answers],
        sources=[answer.row["source"] for answer in answers],
        token_counts=np.asarray([answer.row["tokens"] for answer in answers]),
        answer_token_counts=np.asarray([_answer_tokens(answer.row) for answer in answers]),
        truncated=np.asarray([answer.row["finish_reason"] == "length" for answer in answers]),
        initial_own=initial[0],
        initial_others=initial[1],
        initial_none=initial[2],
        policy_own=policy[0],
        policy_others=policy[1],
        policy_none=policy[2],
        pair_prompt_ids=[prompt_id for prompt_id, _ in pairs],
        pair_policy_chosen=pair_policy[0],
        pair_policy_rejected=pair_policy[1],
        pair_initial_chosen=pair_initial[0],
        pair_initial_rejected=pair_initial[1],
        questions=None if clusters is None else [clusters.questions[prompt_id] for prompt_id in prompt_ids],
        users=None if clusters is None or clusters.users is None else [clusters.users[name] for name in prompt_ids],
        tokens=tokens if len(tokens) == len(answers) else None,
    )


def held_out_clusters(run: RunDirectory) -> Clusters | None:
    """The users and questions of the held-out prompts, as the base's stage wrote them; None where an earlier version
    did, which did not."""
    found = _columns_of_prompts(run, "user", "question")
    if found is None:
        return None
    users, questions = found
    return Clusters(users if any(users.values()) else None, questions)


def held_out_labels(run: RunDirectory) -> Labels | None:
    """What people call the users and questions of the held-out prompts; None where an earlier version wrote the base's
    stage."""
    found = _columns_of_prompts(run, "user_label", "question_label")
    return None if found is None else Labels(*found)


def _columns_of_prompts(run: RunDirectory, *names: str) -> list[dict[str, str]] | None:
    """Columns of the held-out prompts, each by prompt; None where they are not there."""
    path = run.path(run.stage(BASE, "evaluate"), "prompts")
    if not run.list_files(f"{run.stage(BASE, 'evaluate')}/prompts"):
        return None
    table, columns = open_table(path, run.arrow_filesystem()), ["prompt_id", *names]
    if not set(columns) <= set(table.schema.names):
        return None
    rows = table.to_table(columns=columns).to_pylist()
    return [{row["prompt_id"]: row[name] for row in rows} for name in names]


def sampled_tokens(run: RunDirectory, round: Round) -> int:
    """Response tokens that the evaluate stage sampled: answers and, for the base, rejected responses of the pairs."""
    responses = open_table(
        run.path(run.stage(round, "evaluate"), "responses"), run.arrow_filesystem(), ["kind", "tokens"]
    )
    sampled = pyarrow.dataset.field("kind").isin(["answer", "rejected"])
    return sum(responses.to_table(columns=["tokens"], filter=sampled)["tokens"].to_pylist())


def read_scores(run: RunDirectory, round: Round, *, with_tokens: bool = False) -> dict[str, ScoredResponses]:
    """The scored responses of a stage by what they are: answer, rejected (base), pair_chosen and pair_rejected (round).

    What the first answers were scored under for the matrix stands with them. Held-out sets are small: they fit here.
    The log-probs of single tokens are many times the rest, and are read where they are asked for.
    """
    path = run.path(run.stage(round, "evaluate"), "scores")
    written = open_table(path, run.arrow_filesystem(), ["prompt_id", "sample", "kind"])
    table = written.to_table(columns=[name for name in written.schema.names if with_tokens or name != _TOKENS])
    scores: dict[str, ScoredResponses] = {"answer": {}, "rejected": {}, "pair_chosen": {}, "pair_rejected": {}}
    table = table.sort_by([("prompt_id", "ascending"), ("sample", "ascending")])
    of_tokens = _token_lists(table)
    if _TOKENS in table.schema.names:  # as numbers of Python they would take ten times the memory
        table = table.drop_columns([_TOKENS])
    for row, tokens in zip(table.to_pylist(), of_tokens, strict=True):
        is_matrix = row["kind"].startswith("matrix_")
        if is_matrix and not row.get("conditioning_ids"):
            continue  # of an earlier version, whose matrix stands in the manifest
        responses = scores["answer" if is_matrix else row["kind"]]
        response = responses.setdefault(
            (row["prompt_id"], row["sample"]), ScoredResponse(row, {judge: {} for judge in JUDGES}, {})
        )
        response.tokens.update(by_conditioning(row, tokens))
        for judge in JUDGES:
            response.logprobs[judge].update(by_conditioning(row, row.get(f"logprobs_{judge}")))
    return scores


def _token_lists(table: pa.Table) -> Iterable[list[np.ndarray]]:
    """Of each row, and of each of its conditionings, the log-probs of the response's tokens by the initial model."""
    if _TOKENS not in table.schema.names:
        return ([] for _ in range(len(table)))
    return (row[_TOKENS] for row in innermost_lists(table, [_TOKENS], _as_arrays))


def _as_arrays(lists: pa.Array) -> list[np.ndarray]:
    ends = np.cumsum(pa.compute.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64)
    return np.split(lists.flatten().to_numpy(zero_copy_only=False), ends[:-1])


def _token_scores(answer: ScoredResponse) -> TokenScores | None:
    """Those of an answer; None where an earlier version wrote it."""
    copied = answer.row.get(COPIED_TOKENS[0])
    if not answer.tokens or copied is None:
        return None
    others = [values for name, values in answer.tokens.items() if name.startswith(OTHER)]
    without = answer.tokens.get(WITHOUT_CONTEXT)
    return TokenScores(answer.tokens[OWN], np.stack(others), without, np.asarray(copied, dtype=bool))


def _answer_tokens(row: dict[str, Any]) -> int:
    """Those behind the thoughts; a file of an earlier version has the tokens of the whole response alone."""
    tokens = row.get("answer_tokens")
    return int(row["tokens"] if tokens is None else tokens)


def _under_own(responses: ScoredResponses, keys: list[tuple[str, int]], judge: str) -> np.ndarray:
    """[keys]: the log-probs of responses under what they were said to: their own prompt."""
    return np.asarray([responses[key].logprobs[judge][OWN] for key in keys])


def _split(answers: list[ScoredResponse], judge: str) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Own [responses], others [responses, K] and, where any row has a context, without it [responses] (else NaN)."""
    scored = [answer.logprobs[judge] for answer in answers]
    own = np.asarray([logprobs[OWN] for logprobs in scored])
    others = np.asarray([[value for name, value in logprobs.items() if name.startswith(OTHER)] for logprobs in scored])
    if not any(WITHOUT_CONTEXT in logprobs for logprobs in scored):
        return own, others, None
    return own, others, np.asarray([logprobs.get(WITHOUT_CONTEXT, np.nan) for logprobs in scored])
