"""The control `train.shuffle_labels`: pairs whose labels say nothing. Plain functions over Arrow tables."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from mipo_ray.pairs.schema import SAMPLER_LOGPROB
from mipo_ray.seeds import stable_seed


def has_swapped_labels(seed: int, pair_id: str) -> bool:
    """Whether the control `train.shuffle_labels` swaps this pair: a fair coin that depends on seed and pair alone."""
    return bool(stable_seed("shuffled labels", seed, pair_id) & 1)


def shuffle_labels(table: pa.Table, seed: int) -> pa.Table:
    """Pairs (version 2, one rejected response each) with the token ids of chosen and rejected swapped in a seeded half.

    The sampler's log-prob of a chosen response that was swapped is null: it sampled the other one under this prompt.

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
    if (index := table.schema.get_field_index(SAMPLER_LOGPROB)) >= 0:
        logprobs = table.column(index)
        known = pc.if_else(pa.array(swapped), pa.scalar(None, logprobs.type), logprobs)
        table = table.set_column(index, SAMPLER_LOGPROB, known)
    return table
