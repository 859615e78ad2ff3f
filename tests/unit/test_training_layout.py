"""Padded batches: every token where it belongs, and nowhere else."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.training.layout import pad_sequences, padded_batch

token_ids = st.lists(st.integers(0, 2**31 - 1), min_size=1, max_size=9)
pair_rows = st.fixed_dictionaries(
    {"prompt_token_ids": token_ids, "chosen_token_ids": token_ids, "rejected_token_ids": token_ids}
)


@given(st.lists(st.tuples(token_ids, token_ids), min_size=1, max_size=5), st.integers(0, 9))
def test_masks_pick_out_the_ids_that_went_in(sequences, pad_token_id):
    batch = pad_sequences(sequences, pad_token_id)
    assert batch.input_ids.shape == batch.attention_mask.shape == batch.response_mask.shape
    assert batch.input_ids.shape[1] == max(len(prompt) + len(response) for prompt, response in sequences)
    assert batch.token_count == sum(len(prompt) + len(response) for prompt, response in sequences)
    for row, (prompt, response) in enumerate(sequences):
        attended = batch.attention_mask[row].bool()
        assert batch.input_ids[row][attended].tolist() == prompt + response
        assert batch.input_ids[row][batch.response_mask[row]].tolist() == response
        assert attended.tolist() == sorted(attended.tolist(), reverse=True)  # padding on the right
        assert set(batch.input_ids[row][~attended].tolist()) <= {pad_token_id}


@given(st.lists(pair_rows, min_size=1, max_size=4))
def test_pairs_lay_chosen_rows_before_rejected_rows(pairs):
    as_arrays = [{name: np.array(ids, dtype=np.int32) for name, ids in pair.items()} for pair in pairs]
    batch = padded_batch(as_arrays, pad_token_id=0)
    assert batch.pair_count == len(pairs)
    responses = [row[mask].tolist() for row, mask in zip(batch.input_ids, batch.response_mask, strict=True)]
    assert responses == [pair["chosen_token_ids"] for pair in pairs] + [pair["rejected_token_ids"] for pair in pairs]


def test_read_only_arrays_are_taken_as_they_are():
    ids = np.array([1, 2], dtype=np.int32)
    ids.flags.writeable = False
    assert pad_sequences([(ids, ids)], 0).input_ids.tolist() == [[1, 2, 1, 2]]


@pytest.mark.parametrize(
    ("sequences", "message"),
    [
        ([([1], [2]), ([], [3])], "sequence 1: expected at least one prompt token"),
        ([([1], [2]), ([3], [])], "sequence 1: expected at least one response token"),
        ([], "empty batch"),
    ],
)
def test_what_cannot_be_scored_is_refused(sequences, message):
    with pytest.raises(ValueError, match=message):
        pad_sequences(sequences, 0)
