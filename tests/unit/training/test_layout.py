"""Layouts: every token where it belongs, and nowhere else.

python -m pytest tests/unit/training/test_layout.py
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.pairs.schema import pair_columns
from mipo_ray.training.layout import (
    Tree,
    laid_out_tokens,
    lay_out,
    read_lengths,
    read_pair,
    read_pairs,
    token_count,
)
from tests.helpers.packed_rows import drawn_trees, places, token_ids, visible

LAYOUTS = ("padded", "packed", "shared")
PACKED = ("packed", "shared")

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
packed_layouts = pytest.mark.parametrize("layout", PACKED)


def sequences_of(trees: list[Tree]) -> list[tuple[list[int], list[int]]]:
    return [(tree.prompt.tolist(), response.tolist()) for tree in trees for response in tree.responses]


@every_layout
@settings(max_examples=50)
@given(trees=drawn_trees(most_pairs=3))
def test_each_response_token_is_predicted_from_the_one_before_it(layout, trees):
    batch = lay_out(trees, layout)
    ids, positions = batch.input_ids.flatten(), batch.position_ids.flatten()
    assert batch.response_count == len(sequences_of(trees))
    for number, (prompt, response) in enumerate(sequences_of(trees)):
        own = batch.response_index == number
        assert batch.targets[own].tolist() == response
        assert ids[batch.predicting[own]].tolist() == [prompt[-1], *response[:-1]]
        first = len(prompt) - 1
        assert positions[batch.predicting[own]].tolist() == list(range(first, first + len(response)))


@every_layout
@settings(max_examples=50)
@given(trees=drawn_trees(most_pairs=3))
def test_tensors_have_the_shapes_and_types_that_were_said(layout, trees):
    batch = lay_out(trees, layout)
    assert batch.input_ids.shape == batch.position_ids.shape
    assert len(batch.predicting) == len(batch.targets) == len(batch.response_index)
    assert (batch.attention_mask is None) == (layout != "padded")
    assert bool(batch.segments) == (layout != "padded")
    tensors = [batch.input_ids, batch.position_ids, batch.predicting, batch.targets, batch.response_index]
    assert {tensor.dtype for tensor in tensors} == {torch.int64}
    assert batch.input_ids.numel() == laid_out_tokens([tree.lengths for tree in trees], layout)


@settings(max_examples=50)
@given(trees=drawn_trees(most_pairs=3))
def test_padded_rows_are_the_sequences_filled_up_on_the_right(trees):
    batch = lay_out(trees, "padded")
    sequences = [prompt + response for prompt, response in sequences_of(trees)]
    width = max(len(sequence) for sequence in sequences)
    assert batch.input_ids.shape == (len(sequences), width)
    for row, sequence in enumerate(sequences):
        padding = [0] * (width - len(sequence))
        assert batch.input_ids[row].tolist() == sequence + padding
        assert batch.attention_mask[row].tolist() == [1] * len(sequence) + padding
        assert batch.position_ids[row].tolist() == list(range(width))
    assert token_count(trees) == sum(len(sequence) for sequence in sequences) == int(batch.attention_mask.sum())


@packed_layouts
@settings(max_examples=50)
@given(trees=drawn_trees(most_pairs=3))
def test_packed_rows_hold_each_token_once_at_its_own_position(layout, trees):
    batch = lay_out(trees, layout)
    row = places(trees, layout)
    assert batch.input_ids.tolist() == [[place.token for place in row]]
    assert batch.position_ids.tolist() == [[place.position for place in row]]


@packed_layouts
@settings(max_examples=50)
@given(trees=drawn_trees(most_pairs=3))
def test_segments_cover_the_row_in_order_and_say_who_sees_whom(layout, trees):
    batch = lay_out(trees, layout)
    assert [segment.start for segment in batch.segments] == [0, *(segment.end for segment in batch.segments[:-1])]
    assert batch.segments[-1].end == batch.input_ids.shape[1]
    assert all(segment.end > segment.start for segment in batch.segments)
    without_prefix = {(segment.start, segment.end) for segment in batch.segments if not segment.prefix_end}
    seen = torch.zeros(batch.input_ids.shape[1], batch.input_ids.shape[1], dtype=torch.bool)
    for segment in batch.segments:
        if segment.prefix_end:
            assert (segment.prefix_start, segment.prefix_end) in without_prefix
        length = segment.end - segment.start
        seen[segment.start : segment.end, segment.start : segment.end] = torch.ones(length, length).tril().bool()
        seen[segment.start : segment.end, segment.prefix_start : segment.prefix_end] = True
    assert torch.equal(seen, visible(trees, layout))


def test_shared_has_the_prompt_once():
    trees = [Tree(np.arange(100), (np.arange(3), np.arange(5), np.arange(1)))]
    assert {layout: lay_out(trees, layout).input_ids.numel() for layout in LAYOUTS} == {
        "padded": 3 * 105,
        "packed": 3 * 100 + 2 + 4 + 0,
        "shared": 100 + 2 + 4 + 0,
    }
    assert token_count(trees) == 3 * 100 + 3 + 5 + 1


def test_batches_move_whole():
    trees = [Tree(np.arange(3), (np.arange(2), np.arange(1)))]
    for layout in LAYOUTS:
        batch = lay_out(trees, layout)
        moved = batch.to("meta")
        tensors = [value for value in vars(moved).values() if isinstance(value, torch.Tensor)]
        assert {tensor.device.type for tensor in tensors} == {"meta"}
        assert len(tensors) == (6 if layout == "padded" else 5)
        assert (moved.segments, moved.response_count) == (batch.segments, batch.response_count)


def pair_of(**columns) -> dict:
    return {
        "pair_id": "ab12",
        "prompt_token_ids": [1, 2],
        "chosen_token_ids": [3],
        "rejected_token_ids": [[4, 5], [6]],
        "mismatched_prompt_token_ids": [[7], [8, 9]],
    } | columns


def as_lists(trees: Sequence[Tree]) -> list[tuple[list[int], list[list[int]]]]:
    return [(tree.prompt.tolist(), [response.tolist() for response in tree.responses]) for tree in trees]


@pytest.mark.parametrize("objective", ["dpo", "ipo", "infonce"])
def test_a_pair_is_one_tree_with_the_chosen_response_first(objective):
    assert as_lists(read_pair(pair_of(), objective).trees) == [([1, 2], [[3], [4, 5], [6]])]


def test_sft_looks_at_the_chosen_response_alone():
    assert as_lists(read_pair(pair_of(rejected_token_ids=[]), "sft").trees) == [([1, 2], [[3]])]


def test_sami_scores_all_responses_under_each_prompt():
    responses = [[3], [4, 5], [6]]
    assert as_lists(read_pair(pair_of(), "sami").trees) == [([1, 2], responses), ([7], responses), ([8, 9], responses)]


def test_mismatched_prompts_are_read_for_sami_only():
    pair = pair_of()
    del pair["mismatched_prompt_token_ids"]
    assert len(read_pair(pair, "dpo").trees) == 1
    with pytest.raises(KeyError, match="mismatched_prompt_token_ids"):
        read_pair(pair, "sami")


def test_read_only_arrays_are_taken_as_they_are():
    ids = np.array([1, 2], dtype=np.int32)
    ids.flags.writeable = False
    pair = pair_of(prompt_token_ids=ids, chosen_token_ids=ids, rejected_token_ids=[ids])
    batch = lay_out(read_pair(pair, "dpo").trees, "shared")
    assert batch.input_ids.tolist() == [[1, 2, 1, 1]]


@pytest.mark.parametrize(
    ("columns", "objective", "message"),
    [
        ({"prompt_token_ids": []}, "dpo", "pair 'ab12', prompt_token_ids: expected at least one token"),
        ({"chosen_token_ids": []}, "sft", "pair 'ab12', chosen_token_ids: expected at least one token"),
        ({"rejected_token_ids": [[1], []]}, "dpo", "pair 'ab12', rejected_token_ids: expected at least one token"),
        ({"rejected_token_ids": []}, "dpo", "pair 'ab12': expected at least one rejected response, found none"),
        ({"mismatched_prompt_token_ids": [[]]}, "sami", "'ab12', mismatched_prompt_token_ids: expected at least one"),
    ],
)
def test_pairs_that_cannot_be_scored_are_refused(columns, objective, message):
    with pytest.raises(ValueError, match=message):
        read_pair(pair_of(**columns), objective)


@st.composite
def drawn_rows(draw: st.DrawFn) -> list[dict]:
    """Rows of pairs; each with as many rejected responses as it likes."""
    rejected = st.lists(st.tuples(token_ids, token_ids), min_size=1, max_size=3)
    rows = []
    for number in range(draw(st.integers(0, 4))):
        responses, prompts = zip(*draw(rejected), strict=True)
        rows.append(
            {
                "pair_id": str(number),
                "prompt_token_ids": draw(token_ids),
                "chosen_token_ids": draw(token_ids),
                "rejected_token_ids": list(responses),
                "mismatched_prompt_token_ids": list(prompts),
            }
        )
    return rows


@settings(max_examples=50)
@given(rows=drawn_rows(), objective=st.sampled_from(["dpo", "ipo", "infonce", "sft", "sami"]), cut=st.integers(0, 4))
def test_a_table_gives_the_pairs_of_its_rows_and_their_lengths(rows, objective, cut):
    """In tables of several chunks too, each a slice of something larger, and with no other column than is read."""
    ids = pa.list_(pa.int32())
    lists = [("prompt_token_ids", ids), ("chosen_token_ids", ids)]
    lists += [("rejected_token_ids", pa.list_(ids)), ("mismatched_prompt_token_ids", pa.list_(ids))]
    whole = pa.Table.from_pylist(rows, pa.schema([("pair_id", pa.string()), *lists])).select(pair_columns(objective))
    for table in (whole, pa.concat_tables([whole.slice(0, cut), whole.slice(cut)]), whole.slice(cut)):
        expected = [read_pair(row, objective) for row in rows[cut if table.num_rows < len(rows) else 0 :]]
        found = read_pairs(table, objective)
        assert [pair.pair_id for pair in found] == [pair.pair_id for pair in expected]
        assert [as_lists(pair.trees) for pair in found] == [as_lists(pair.trees) for pair in expected]
        lengths = [[(len(prompt), [*map(len, own)]) for prompt, own in as_lists(pair.trees)] for pair in expected]
        assert [[(tree.prompt, [*tree.responses]) for tree in pair.lengths] for pair in found] == lengths
        assert read_lengths(table, objective) == [pair.lengths for pair in found]


@every_layout
def test_an_empty_batch_is_refused(layout):
    with pytest.raises(ValueError, match="empty batch"):
        lay_out([], layout)
