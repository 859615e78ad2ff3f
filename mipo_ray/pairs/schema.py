"""The schema of pairs: their form in a file and in memory, and what training reads of them. No Ray, no torch.

In memory the rejected side of a pair is always lists, one entry for each rejected response (version 2). A file of pairs
with one rejected response each has scalars in their place (version 1). `write_form` makes the one from the other, and
`as_version_2` turns what was read back.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from mipo_ray.config.train import Objective
from mipo_ray.prompts.rows import MESSAGES

TOKEN_IDS = pa.list_(pa.int32())

# What a conditioning block carries through the engine, beside the columns of `blocks.condition_block`.
RESPONSES = pa.list_(
    pa.struct(
        [
            ("token_ids", TOKEN_IDS),
            ("text", pa.string()),  # its thoughts between marks that `text.thoughts` knows
            ("answer_tokens", pa.int32()),  # those behind the thoughts: all where there are none, 0 without an answer
            ("finish_reason", pa.string()),
            ("logprob", pa.float32()),
            ("prompt_tokens", pa.int32()),
            ("cached_tokens", pa.int32()),
            ("control_tokens", pa.int32()),
            # How many were cut off behind its last whole sentence (`filters.truncated=trim`); null where that was not
            # looked for, or there is none.
            ("trimmed_tokens", pa.int32()),
        ]
    )
)
SCORES = pa.list_(pa.struct([("sample", pa.int32()), ("negative", pa.int32()), ("logprob", pa.float32())]))

# The rejected side: scalars in version 1, lists of as many entries as the pair has rejected responses in version 2.
REJECTED_SIDE = {
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
        # Control tokens inside the pair's responses, not counting those that end them.
        ("control_tokens", pa.int32()),
        ("extra", pa.string()),
    ],
    metadata={"mipo_ray.pair_schema": "1"},
)

# Version 2: several rejected responses in a row.
PAIR_SCHEMA_2 = pa.schema(
    [pa.field(f.name, pa.list_(f.type)) if f.name in REJECTED_SIDE else f for f in PAIR_SCHEMA],
    metadata={"mipo_ray.pair_schema": "2"},
)


# A column more of pairs whose responses are trimmed: how many of the pair's were cut back to their last whole sentence.
TRIMMED_RESPONSES = "trimmed_responses"

# The strategy of pairs that were not sampled but given to the run (`pairs.path`).
GIVEN = "given"

# What a pair of version 2 holds, with one rejected response, that answers the pair's own prompt; it has no PMI.
NOT_MISMATCHED: dict[str, Any] = {
    "mismatched_messages": [[]],
    "mismatched_prompt_id": [""],
    "mismatched_prompt_token_ids": [[]],
    "pmi": None,
    "sample": 0,
}

# What a row of version 1 holds that was dropped before it had a mismatched prompt.
_NOT_SAMPLED: dict[str, Any] = {
    "mismatched_messages": [],
    "mismatched_prompt_id": "",
    "mismatched_prompt_token_ids": [],
}


def pair_columns(objective: Objective) -> list[str]:
    """The columns of a pair that an objective is trained on."""
    columns = ["pair_id", "prompt_token_ids", "chosen_token_ids"]
    if objective != "sft":
        columns.append("rejected_token_ids")
    if objective == "sami":
        columns.append("mismatched_prompt_token_ids")
    return columns


# The sampler's log-prob of the chosen response: read where it is there, to compare it with the trainer's.
SAMPLER_LOGPROB = "chosen_logprob"


def missing_columns(wanted: Sequence[str], found: Sequence[str]) -> str:
    """What to say of a file of pairs that lacks a wanted column; "" for one that has them all."""
    missing = sorted(set(wanted) - set(found))
    return f"expected the columns {', '.join(missing)} too, found {', '.join(found)}" if missing else ""


def write_form(pairs: list[dict[str, Any]], rejected_per_pair: int) -> pa.Table:
    """Pairs, in the form of version 2, as a file holds them: version 1 where a pair has one rejected response."""
    if rejected_per_pair > 1:
        return pa.Table.from_pylist(pairs, schema=PAIR_SCHEMA_2)
    rows = [
        pair | {name: pair[name][0] if pair[name] else _NOT_SAMPLED[name] for name in REJECTED_SIDE} for pair in pairs
    ]
    return pa.Table.from_pylist(rows, schema=PAIR_SCHEMA)


def with_trimmed(table: pa.Table, pairs: list[dict[str, Any]]) -> pa.Table:
    """The table of `pairs` with the column TRIMMED_RESPONSES."""
    trimmed = [(pair["chosen_trimmed_tokens"], *pair["rejected_trimmed_tokens"]) for pair in pairs]
    counts = [sum((tokens or 0) > 0 for tokens in of_pair) for of_pair in trimmed]
    return table.append_column(TRIMMED_RESPONSES, pa.array(counts, pa.int32()))


def kept_pairs(table: pa.Table) -> pa.Table:
    """The pairs, of either version, that no filter dropped: in the form of version 2, without the column `dropped`."""
    return as_version_2(table.filter(pc.equal(table["dropped"], "")).drop_columns(["dropped"]))


def as_version_2(table: pa.Table) -> pa.Table:
    """Pairs as a file holds them, of either version, with every column of the rejected side as lists.

    Nothing is copied: a list of one value each is the values themselves and a list of offsets.
    """
    for name, value_type in REJECTED_SIDE.items():
        index = table.schema.get_field_index(name)
        if index >= 0 and table.schema.field(index).type == value_type:
            list_type = pa.list_(value_type)
            chunks = [
                pa.ListArray.from_arrays(np.arange(len(chunk) + 1, dtype=np.int32), chunk, type=list_type)
                for chunk in table.column(index).chunks
            ]
            table = table.set_column(index, name, pa.chunked_array(chunks, list_type))
    return table


def innermost_lists(
    rows: pa.Table, columns: Sequence[str], values_of: Callable[[pa.Array], list[Any]]
) -> Iterator[dict[str, Any]]:
    """Each row's `columns`, which are lists or lists of lists, as {column: values}.

    In the place of each innermost list stands what `values_of` makes of it: it is called once for a column, with all
    innermost lists of that column in order, and returns one value for each of them.
    """

    def nested(lists: pa.Array) -> list[Any]:
        if not pa.types.is_nested(lists.type.value_type):
            return values_of(lists)
        inner = iter(nested(lists.flatten()))
        return [list(itertools.islice(inner, length)) for length in pc.list_value_length(lists).to_pylist()]

    values = [nested(rows[name].combine_chunks()) for name in columns]
    return (dict(zip(columns, of_row, strict=True)) for of_row in zip(*values, strict=True))


def lists_as_arrays(lists: pa.Array) -> list[NDArray[np.int64]]:
    """Each list of ids as [tokens] int64, a slice of one array of them all."""
    ids = lists.flatten().to_numpy(zero_copy_only=False).astype(np.int64)
    ends = np.cumsum(pc.list_value_length(lists).to_numpy(zero_copy_only=False), dtype=np.int64).tolist()
    return [ids[start:end] for start, end in itertools.pairwise([0, *ends])]
