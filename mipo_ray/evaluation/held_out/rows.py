"""Reads what the evaluate stages wrote back as the arrays that `metrics.measure` takes."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow.dataset

from mipo_ray.evaluation.held_out.metrics import MeasuredRows
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory


def measured_rows(run: RunDirectory, round: Round) -> MeasuredRows:
    """What `metrics.measure` takes, read from a policy's scores (and, for the held-out pairs, the base's)."""
    answers = read_scores(run, round, "answer")
    initial = _split(answers["logprobs_initial"], answers["context"])
    policy = initial if round.is_base else _split(answers["logprobs_policy"], answers["context"])

    base_chosen = {
        row["prompt_id"]: row["logprobs_initial"][0]
        for row in _rows(read_scores(run, BASE, "answer"))
        if row["sample"] == 0
    }
    base_rejected = {row["prompt_id"]: row["logprobs_initial"][0] for row in _rows(read_scores(run, BASE, "rejected"))}
    pair_ids = sorted(base_rejected)
    pair_initial = [np.asarray([side[key] for key in pair_ids]) for side in (base_chosen, base_rejected)]
    pair_policy = pair_initial
    if not round.is_base:
        pair_policy = []
        for kind in ("pair_chosen", "pair_rejected"):
            scored = {row["prompt_id"]: row["logprobs_policy"][0] for row in _rows(read_scores(run, round, kind))}
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


def sampled_tokens(run: RunDirectory, round: Round) -> int:
    """Response tokens that the evaluate stage sampled: answers and, for the base, rejected responses of the pairs."""
    responses = pyarrow.dataset.dataset(
        run.path(run.stage(round, "evaluate"), "responses"), filesystem=run.arrow_filesystem(), format="parquet"
    )
    sampled = pyarrow.dataset.field("kind").isin(["answer", "rejected"])
    return sum(responses.to_table(columns=["tokens"], filter=sampled)["tokens"].to_pylist())


def read_scores(run: RunDirectory, round: Round, kind: str) -> dict[str, list[Any]]:
    """The scores of one kind as columns, in the order of prompt and sample. Held-out sets are small: they fit here."""
    scores = pyarrow.dataset.dataset(
        run.path(run.stage(round, "evaluate"), "scores"), filesystem=run.arrow_filesystem(), format="parquet"
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
