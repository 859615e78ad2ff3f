"""Pairs chosen by a reward: of several responses to one prompt the best against the worst. Plain functions over Arrow
tables; no Ray, no torch.

What DPO fits to such pairs is the reward that chose them (arXiv 2305.18290, equation 5), and no mutual information,
unless that is the reward: nothing is mismatched. A pair stands in a file as one that was sampled by mutual information,
with three columns more.
"""

from __future__ import annotations

from collections.abc import Sequence
from statistics import fmean
from typing import Any

import pyarrow as pa

from mipo_ray.config.filters import FiltersConfig
from mipo_ray.pairs.assemble import (
    EMPTY_RESPONSE,
    first_equal,
    pair_id,
    pair_of,
    pointwise_mutual_information,
)
from mipo_ray.pairs.filters import drop_reason, is_cut_short
from mipo_ray.pairs.schema import NOT_MISMATCHED, with_trimmed, write_form

# The rewards of a sampled block's responses, row by row; null for a response without one.
REWARDS = pa.list_(pa.float64())

# Columns of such pairs, beside those of `schema.PAIR_SCHEMA`: rewards of the two responses, and the mean over all that
# were sampled to the prompt, whatever became of the pair; null where there is none.
REWARD_COLUMNS = ("chosen_reward", "rejected_reward", "sampled_reward")

EQUAL_REWARDS = "equal_rewards"
NO_REWARD = "no_reward"


def best_and_worst(rewards: Sequence[float | None], usable: Sequence[bool]) -> tuple[int, int] | None:
    """The places of the largest and of the smallest reward among the usable responses, the first ones where several
    are equal; None where fewer than two of them have a reward."""
    known = [(reward, index) for index, reward in enumerate(rewards) if reward is not None and usable[index]]
    if len(known) < 2:
        return None
    best = max(known, key=lambda one: (one[0], -one[1]))
    worst = min(known)
    return best[1], worst[1]


def responses_to_score(block: pa.Table) -> list[list[dict[str, Any]]]:
    """Every response of a sampled block under each mismatched prompt of its row, as `assemble.to_score` gives them."""
    return [
        [
            {
                "sample": sample,
                "negative": negative,
                "prompt_token_ids": row["mismatched_token_ids"][negative],
                "response_token_ids": response["token_ids"],
            }
            for sample, response in enumerate(row["responses"])
            for negative in sorted(set(first_equal(row["mismatched_token_ids"])))
        ]
        for row in block.to_pylist()
    ]


def pmi_of_responses(block: pa.Table) -> list[list[float | None]]:
    """The pointwise mutual information of each response with its prompt, nats, row by row; None where a score is
    missing. The block holds `responses` and their `scores` (SCORES)."""
    found: list[list[float | None]] = []
    for row in block.to_pylist():
        scores = {(score["sample"], score["negative"]): score["logprob"] for score in row["scores"]}
        scored_as = first_equal(row["mismatched_token_ids"])
        found.append(
            [
                pointwise_mutual_information(response["logprob"], [scores.get((sample, same)) for same in scored_as])
                for sample, response in enumerate(row["responses"])
            ]
        )
    return found


def choose_pairs(block: pa.Table, *, seed: int, round_index: int, filters: FiltersConfig) -> pa.Table:
    """One pair for each row of a sampled block that holds `rewards` (REWARDS) beside `responses` (RESPONSES).

    Responses that the length limit cut are chosen from only where `filters.truncated` lets them, or where too few
    others are there; then the pair is dropped as truncated. A pair of equal rewards is dropped, and so is one of a
    prompt with fewer than two rewards. The table is what a file holds.
    """
    pairs, rewards = [], []
    for row in block.to_pylist():
        pair, of_pair = _pair(row, filters)
        pair["pair_id"] = pair_id(seed, round_index, row["prompt_id"], 0)
        pair["round"] = round_index
        pairs.append(pair)
        rewards.append(of_pair)
    table = write_form(pairs, 1)
    table = with_trimmed(table, pairs) if filters.truncated == "trim" else table
    for column, name in enumerate(REWARD_COLUMNS):
        table = table.append_column(name, pa.array([of_pair[column] for of_pair in rewards], pa.float32()))
    return table


def _pair(row: dict[str, Any], filters: FiltersConfig) -> tuple[dict[str, Any], tuple[float | None, ...]]:
    """A pair in the form of version 2, but for its id and round; and what `REWARD_COLUMNS` holds of it."""
    responses, rewards = row["responses"], row["rewards"]
    known = [reward for reward in rewards if reward is not None]
    whole = [
        not is_cut_short(response["finish_reason"], response.get("trimmed_tokens"), filters) for response in responses
    ]
    places = best_and_worst(rewards, whole) or best_and_worst(rewards, [True] * len(rewards))
    chosen, rejected = (EMPTY_RESPONSE, EMPTY_RESPONSE) if places is None else (responses[index] for index in places)
    pair = pair_of(row, chosen, [rejected], responses) | NOT_MISMATCHED
    sampled = fmean(known) if known else None
    if places is None:
        return pair | {"dropped": row["dropped"] or NO_REWARD}, (None, None, sampled)
    best, worst = (rewards[index] for index in places)
    dropped = EQUAL_REWARDS if best == worst else drop_reason(pair, filters, with_pmi=False)
    return pair | {"dropped": row["dropped"] or dropped}, (best, worst, sampled)
