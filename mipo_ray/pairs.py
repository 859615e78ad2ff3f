"""Preference pairs: the schema that the trainer reads, and how pairs are assembled from sampled responses.

Plain functions over Arrow tables; no Ray, no torch.
"""

from __future__ import annotations

import hashlib
import math
from typing import Any

import numpy as np
import pyarrow as pa

from mipo_ray.config_pairs import FiltersConfig, GenerationConfig
from mipo_ray.pair_filters import drop_reason
from mipo_ray.seeds import stable_seed

MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))
TOKEN_IDS = pa.list_(pa.int32())

# What a conditioning block carries through the engine, beside the columns of `conditioning_blocks.condition_block`.
RESPONSES = pa.list_(
    pa.struct(
        [
            ("token_ids", TOKEN_IDS),
            ("text", pa.string()),
            ("finish_reason", pa.string()),
            ("logprob", pa.float32()),
            ("prompt_tokens", pa.int32()),
            ("cached_tokens", pa.int32()),
        ]
    )
)
SCORES = pa.list_(pa.struct([("sample", pa.int32()), ("negative", pa.int32()), ("logprob", pa.float32())]))

# The rejected side: scalars in version 1, lists of as many entries as the pair has rejected responses in version 2.
_REJECTED = {
    "mismatched_messages": MESSAGES,
    "mismatched_prompt_id": pa.string(),
    "mismatched_prompt_token_ids": TOKEN_IDS,
    "rejected_token_ids": TOKEN_IDS,
    "rejected": pa.string(),
    "rejected_finish_reason": pa.string(),
    "rejected_logprob": pa.float32(),
}

# Version 1. `dropped` is empty for a pair that is trained on, else the reason why it is not; rows that were dropped
# stay in the table, so that every prompt is accounted for and a resumed stage does not sample them again.
PAIR_SCHEMA = pa.schema(
    [
        ("pair_id", pa.string()),
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("mismatched_messages", MESSAGES),
        ("context", pa.string()),
        ("strategy", pa.string()),
        ("mismatched_prompt_id", pa.string()),
        ("prompt_token_ids", TOKEN_IDS),
        ("mismatched_prompt_token_ids", TOKEN_IDS),  # empty for rows that were dropped before they were sampled
        ("chosen_token_ids", TOKEN_IDS),
        ("rejected_token_ids", TOKEN_IDS),
        ("chosen", pa.string()),
        ("rejected", pa.string()),
        ("chosen_finish_reason", pa.string()),
        ("rejected_finish_reason", pa.string()),
        ("chosen_logprob", pa.float32()),
        ("rejected_logprob", pa.float32()),
        # log p(chosen | prompt) - log p(chosen | mismatched prompt), nats, by the sampler; null where not scored
        ("pmi", pa.float32()),
        ("round", pa.int32()),
        ("sample", pa.int32()),
        ("dropped", pa.string()),
        # Tokens that the engine spent on the prompt, in the row of sample 0 (0 in the others): sampled ones, those of
        # the prompts it was sent, and those among them that its prefix cache held.
        ("generated_tokens", pa.int32()),
        ("engine_prompt_tokens", pa.int32()),
        ("cached_prompt_tokens", pa.int32()),
        ("extra", pa.string()),
    ],
    metadata={"mipo_ray.pair_schema": "1"},
)

# Version 2: several rejected responses in a row.
PAIR_SCHEMA_2 = pa.schema(
    [pa.field(f.name, pa.list_(f.type)) if f.name in _REJECTED else f for f in PAIR_SCHEMA],
    metadata={"mipo_ray.pair_schema": "2"},
)

_EMPTY_RESPONSE = {
    "token_ids": [],
    "text": "",
    "finish_reason": "",
    "logprob": float("nan"),
    "prompt_tokens": 0,
    "cached_tokens": 0,
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
    mismatched prompts) pairs have a PMI, and `filters.min_pmi` applies. The schema is PAIR_SCHEMA where a pair has one
    rejected response, else PAIR_SCHEMA_2.
    """
    rows = block.to_pylist()
    pairs = []
    for row in rows:
        scores = {(s["sample"], s["negative"]): s["logprob"] for s in row.get("scores") or []}
        scored_as = _first_equal(row["mismatched_token_ids"])
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
    if generation.rejected_per_pair > 1:
        return pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA_2)
    return pa.Table.from_pylist([_version_1(pair) for pair in pairs], schema=PAIR_SCHEMA)


def to_score(block: pa.Table, *, generation: GenerationConfig, filters: FiltersConfig) -> list[list[dict[str, Any]]]:
    """Which matched responses of a sampled block are to be scored under which mismatched prompts, row by row.

    Each is {"sample", "negative", "prompt_token_ids", "response_token_ids"}. Pairs that another filter drops are not
    scored: nothing is trained on them. Equal mismatched prompts are scored once, as the first of them.
    """
    rows = block.to_pylist()
    wanted: list[list[dict[str, Any]]] = []
    for row in rows:
        pairs = [] if row["dropped"] else range(generation.samples_per_prompt)
        scored_as = _first_equal(row["mismatched_token_ids"])
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


def as_version_2(table: pa.Table) -> pa.Table:
    """Pairs of either version with every column of the rejected side as lists; other columns as they are.

    Nothing is copied: a list of one value each is the values themselves and a list of offsets.
    """
    for name, value_type in _REJECTED.items():
        index = table.schema.get_field_index(name)
        if index >= 0 and table.schema.field(index).type == value_type:
            list_type = pa.list_(value_type)
            chunks = [
                pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk, type=list_type)
                for chunk in table.column(index).chunks
            ]
            table = table.set_column(index, name, pa.chunked_array(chunks, list_type))
    return table


def has_swapped_labels(seed: int, pair_id: str) -> bool:
    """Whether the control `train.shuffle_labels` swaps this pair: a fair coin that depends on seed and pair alone."""
    return bool(stable_seed("shuffled labels", seed, pair_id) & 1)


def shuffle_labels(table: pa.Table, seed: int) -> pa.Table:
    """Pairs (version 2, one rejected response each) with the token ids of chosen and rejected swapped in a seeded half.

    Raises ValueError where a pair has several rejected responses.
    """
    chosen = table.column("chosen_token_ids").combine_chunks()
    rejected = table.column("rejected_token_ids").combine_chunks()
    if len(rejected.flatten()) != len(table):
        raise ValueError("shuffle_labels: expected one rejected response in each pair")
    both = pa.concat_arrays([chosen, rejected.flatten()])
    swapped = np.array([has_swapped_labels(seed, name) for name in table.column("pair_id").to_pylist()], dtype=bool)
    first = np.arange(len(table), dtype=np.int64)
    one_each = np.arange(len(table) + 1, dtype=np.int32)
    new_rejected = pa.ListArray.from_arrays(one_each, both.take(pa.array(first + len(table) * ~swapped)))
    for name, column in (
        ("chosen_token_ids", both.take(pa.array(first + len(table) * swapped))),
        ("rejected_token_ids", new_rejected),
    ):
        table = table.set_column(table.schema.get_field_index(name), name, column)
    return table


def _pair(rows: list[dict[str, Any]], row: dict[str, Any], sample: int, generation: GenerationConfig) -> dict[str, Any]:
    """One pair in the form of version 2, without what depends on seed, round, scores and filters."""
    responses = row["responses"]
    chosen = responses[sample] if responses else _EMPTY_RESPONSE
    negatives = negatives_of(sample, generation)
    rejected = [_rejected(rows, row, negative, generation.samples_per_prompt) for negative in negatives]
    pair = {name: row[name] for name in PAIR_SCHEMA.names if name in row}
    for name in ("mismatched_messages", "mismatched_prompt_id"):
        pair[name] = [row[name][negative] for negative in negatives] if row[name] else []
    mismatched = row["mismatched_token_ids"]
    pair["mismatched_prompt_token_ids"] = [] if row["dropped"] else [mismatched[negative] for negative in negatives]
    first = responses if sample == 0 else []
    return pair | {
        "sample": sample,
        "chosen": chosen["text"],
        "chosen_token_ids": chosen["token_ids"],
        "chosen_finish_reason": chosen["finish_reason"],
        "chosen_logprob": chosen["logprob"],
        "rejected": [response["text"] for response in rejected],
        "rejected_token_ids": [response["token_ids"] for response in rejected],
        "rejected_finish_reason": [response["finish_reason"] for response in rejected],
        "rejected_logprob": [response["logprob"] for response in rejected],
        "generated_tokens": sum(len(response["token_ids"]) for response in first),
        "engine_prompt_tokens": sum(response["prompt_tokens"] for response in first),
        "cached_prompt_tokens": sum(response["cached_tokens"] for response in first),
    }


def _rejected(rows: list[dict[str, Any]], row: dict[str, Any], negative: int, samples: int) -> dict[str, Any]:
    """Mismatched response number `negative` of a row: its own, or a matched one of its partner."""
    if not row["responses"]:
        return _EMPTY_RESPONSE
    if not row["partner_index"]:
        own = row["responses"][samples:]
        return own[negative] if own else _EMPTY_RESPONSE  # sampled only for rows that reuse its matched ones
    index = row["partner_index"][negative]
    partner = rows[index] if index < len(rows) else None
    if partner is None or partner["prompt_id"] != row["mismatched_prompt_id"][negative]:
        raise RuntimeError(
            f"prompt {row['prompt_id']!r}: its partner {row['mismatched_prompt_id'][negative]!r} is not where "
            "conditioning put it: the block was cut or merged on its way; lower conditioning.block_size"
        )
    return partner["responses"][negative % samples] if partner["responses"] else _EMPTY_RESPONSE


def _partner_without_response(rows: list[dict[str, Any]], row: dict[str, Any]) -> str:
    """The reason to drop a row whose partner was not sampled; "" where there is none."""
    return "" if all(rows[index]["responses"] for index in row["partner_index"]) else "no_partner_response"


def _first_equal(prompts: list[list[int]]) -> list[int]:
    """For each prompt the index of the first one that is equal to it."""
    first: dict[tuple[int, ...], int] = {}
    return [first.setdefault(tuple(token_ids), index) for index, token_ids in enumerate(prompts)]


def _version_1(pair: dict[str, Any]) -> dict[str, Any]:
    empty: dict[str, Any] = {"mismatched_messages": [], "mismatched_prompt_id": "", "mismatched_prompt_token_ids": []}
    return pair | {name: pair[name][0] if pair[name] else empty[name] for name in _REJECTED}
