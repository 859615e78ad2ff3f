"""Pairs assembled from sampled responses: which answer stands against which, and what each pair scores.

Plain functions over Arrow tables; no Ray, no torch.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import pyarrow as pa

from mipo_ray.config.filters import FiltersConfig
from mipo_ray.config.generation import GenerationConfig
from mipo_ray.pairs.filters import drop_reason
from mipo_ray.pairs.schema import PAIR_SCHEMA, with_trimmed, write_form

# That of a row that was not sampled.
EMPTY_RESPONSE: dict[str, Any] = {
    "token_ids": [],
    "text": "",
    "answer_tokens": 0,
    "finish_reason": "",
    "logprob": float("nan"),
    "prompt_tokens": 0,
    "cached_tokens": 0,
    "control_tokens": 0,
    "trimmed_tokens": None,
}


def pair_id(seed: int, round_index: int, prompt_id: str, sample: int) -> str:
    """Stable id of a pair, 16 hex digits. Sorting by it is a seeded shuffle: the order of training."""
    return hashlib.sha256(f"{seed}/{round_index}/{sample}/{prompt_id}".encode()).hexdigest()[:16]


def negatives_of(sample: int, generation: GenerationConfig) -> range:
    """Which of a prompt's K mismatched responses its matched response number `sample` is paired with."""
    if generation.pairing == "all":
        return range(generation.negatives_per_prompt)
    per_pair = generation.rejected_per_pair
    return range(sample * per_pair, (sample + 1) * per_pair)


def assemble_pairs(
    block: pa.Table, *, seed: int, round_index: int, generation: GenerationConfig, filters: FiltersConfig
) -> pa.Table:
    """Pairs from one conditioning block of sampled responses: `samples_per_prompt` rows for each of its rows.

    `block` holds the conditioned columns and `responses` (RESPONSES): n matched ones and, unless the strategy reuses
    other rows' matched responses, K mismatched ones. With `scores` (SCORES, the log-probs of matched responses under
    mismatched prompts) pairs have a PMI, and `filters.min_pmi` applies. The table is what a file holds
    (`schema.write_form`).
    """
    rows = block.to_pylist()
    pairs = []
    for row in rows:
        scores = {(s["sample"], s["negative"]): s["logprob"] for s in row.get("scores") or []}
        scored_as = first_equal(row["mismatched_token_ids"])
        for sample in range(generation.samples_per_prompt):
            pair = _pair(rows, row, sample, generation)
            pair["pair_id"] = pair_id(seed, round_index, row["prompt_id"], sample)
            pair["round"] = round_index
            under_mismatched = [
                scores.get((sample, scored_as[negative])) if scored_as else None
                for negative in negatives_of(sample, generation)
            ]
            pair["pmi"] = pointwise_mutual_information(pair["chosen_logprob"], under_mismatched)
            pair["dropped"] = (
                row["dropped"]
                or _partner_without_response(rows, row)
                or drop_reason(pair, filters, with_pmi="scores" in block.column_names)
            )
            pairs.append(pair)
    table = write_form(pairs, generation.rejected_per_pair)
    return with_trimmed(table, pairs) if filters.truncated == "trim" else table


def to_score(block: pa.Table, *, generation: GenerationConfig, filters: FiltersConfig) -> list[list[dict[str, Any]]]:
    """Which matched responses of a sampled block are to be scored under which mismatched prompts, row by row.

    Each is {"sample", "negative", "prompt_token_ids", "response_token_ids"}. Pairs that another filter drops are not
    scored: nothing is trained on them. Equal mismatched prompts are scored once, as the first of them.
    """
    rows = block.to_pylist()
    wanted: list[list[dict[str, Any]]] = []
    for row in rows:
        pairs = [] if row["dropped"] else range(generation.samples_per_prompt)
        scored_as = first_equal(row["mismatched_token_ids"])
        wanted.append(
            [
                {
                    "sample": sample,
                    "negative": negative,
                    "prompt_token_ids": row["mismatched_token_ids"][negative],
                    "response_token_ids": row["responses"][sample]["token_ids"],
                }
                for sample in pairs
                if not drop_reason(_pair(rows, row, sample, generation), filters, with_pmi=False)
                for negative in sorted({scored_as[number] for number in negatives_of(sample, generation)})
            ]
        )
    return wanted


def pointwise_mutual_information(matched: float, mismatched: list[float | None]) -> float | None:
    """log p(y | x) - log mean_k p(y | x'_k), nats: the pointwise mutual information of a response and its prompt.

    The mean over mismatched prompts stands for the marginal p(y). None where a term is missing.
    """
    known = [value for value in mismatched if value is not None]
    if not known or len(known) < len(mismatched):
        return None
    largest = max(known)
    marginal = largest + math.log(sum(math.exp(value - largest) for value in known) / len(known))
    return matched - marginal


def pair_of(
    row: dict[str, Any], chosen: dict[str, Any], rejected: list[dict[str, Any]], sampled: list[dict[str, Any]]
) -> dict[str, Any]:
    """A pair of responses (RESPONSES) to a conditioned row, in the form of version 2, without what is mismatched, its
    id, number and round, its PMI, and whether it is dropped. sampled: those whose tokens it accounts for."""
    return {name: row[name] for name in PAIR_SCHEMA.names if name in row} | {
        "chosen": chosen["text"],
        "chosen_token_ids": chosen["token_ids"],
        "chosen_answer_tokens": chosen.get("answer_tokens"),
        "chosen_finish_reason": chosen["finish_reason"],
        "chosen_trimmed_tokens": chosen.get("trimmed_tokens"),
        "chosen_logprob": chosen["logprob"],
        "rejected": [response["text"] for response in rejected],
        "rejected_token_ids": [response["token_ids"] for response in rejected],
        "rejected_answer_tokens": [response.get("answer_tokens") for response in rejected],
        "rejected_finish_reason": [response["finish_reason"] for response in rejected],
        "rejected_trimmed_tokens": [response.get("trimmed_tokens") for response in rejected],
        "rejected_logprob": [response["logprob"] for response in rejected],
        "generated_tokens": sum(
            len(response["token_ids"]) + (response.get("trimmed_tokens") or 0) for response in sampled
        ),
        "engine_prompt_tokens": sum(response["prompt_tokens"] for response in sampled),
        "cached_prompt_tokens": sum(response["cached_tokens"] for response in sampled),
        "control_tokens": sum(response["control_tokens"] or 0 for response in (chosen, *rejected)),
    }


def _pair(rows: list[dict[str, Any]], row: dict[str, Any], sample: int, generation: GenerationConfig) -> dict[str, Any]:
    """One pair in the form of version 2, without what depends on seed, round, scores and filters."""
    responses = row["responses"]
    chosen = responses[sample] if responses else EMPTY_RESPONSE
    negatives = negatives_of(sample, generation)
    rejected = [_rejected(rows, row, negative, generation.samples_per_prompt) for negative in negatives]
    pair = pair_of(row, chosen, rejected, responses if sample == 0 else [])
    for name in ("mismatched_messages", "mismatched_prompt_id"):
        pair[name] = [row[name][negative] for negative in negatives] if row[name] else []
    mismatched = row["mismatched_token_ids"]
    pair["mismatched_prompt_token_ids"] = [] if row["dropped"] else [mismatched[negative] for negative in negatives]
    return pair | {"sample": sample}


def _rejected(rows: list[dict[str, Any]], row: dict[str, Any], negative: int, samples: int) -> dict[str, Any]:
    """Mismatched response number `negative` of a row: its own, or a matched one of its partner."""
    if not row["responses"]:
        return EMPTY_RESPONSE
    if not row["partner_index"]:
        own = row["responses"][samples:]
        return own[negative] if own else EMPTY_RESPONSE  # sampled only for rows that reuse its matched ones
    index = row["partner_index"][negative]
    partner = rows[index] if index < len(rows) else None
    if partner is None or partner["prompt_id"] != row["mismatched_prompt_id"][negative]:
        raise RuntimeError(
            f"prompt {row['prompt_id']!r}: its partner {row['mismatched_prompt_id'][negative]!r} is not where "
            "conditioning put it: the block was cut or merged on its way; lower conditioning.block_size"
        )
    return partner["responses"][negative % samples] if partner["responses"] else EMPTY_RESPONSE


def _partner_without_response(rows: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """The reason to drop a row whose partner was not sampled; "" where there is none."""
    return "" if all(rows[index]["responses"] for index in row["partner_index"]) else "no_partner_response"


def first_equal(prompts: list[list[int]]) -> list[int]:
    """For each prompt the index of the first one that is equal to it."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(token_ids), index) for index, token_ids in enumerate(prompts)]
