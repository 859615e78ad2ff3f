"""How a step's pairs are shared out, and how a worker's share becomes micro-batches.

python -m pytest tests/unit/training/test_micro_batches.py
"""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mipo_ray.training.layout import Pair, laid_out_tokens, lay_out, read_pair
from mipo_ray.training.shares import deal
from mipo_ray.training.step import in_groups, micro_batches

sizes_and_workers = st.tuples(st.lists(st.integers(1, 5000), max_size=40), st.integers(1, 9))


@given(sizes_and_workers)
def test_every_pair_is_dealt_once_and_workers_get_equally_many(drawn):
    sizes, workers = drawn
    shares = deal(sizes, workers)
    assert len(shares) == workers
    assert sorted(index for share in shares for index in share) == list(range(len(sizes)))
    counts = [len(share) for share in shares]
    assert max(counts) - min(counts) <= 1


@given(sizes_and_workers)
def test_workers_differ_by_at_most_the_largest_pair(drawn):
    """Of two workers the one or the other gets the larger pair, in turns, and what they differ by in one lap lies above
    what they differ by in the next: all differences together span at most the sizes that there are, and those of
    the last lap the sizes down to 0, where it does not go all the way round."""
    sizes, workers = drawn
    sums = [sum(sizes[index] for index in share) for share in deal(sizes, workers)]
    smallest = min(sizes, default=0) if len(sizes) % workers == 0 else 0
    assert max(sums) - min(sums) <= max(sizes, default=0) - smallest


def test_dealing_goes_there_and_back_in_decreasing_order():
    assert deal([10, 40, 20, 30, 60, 50, 70], 3) == [[6, 2, 0], [4, 3], [5, 1]]


def test_equal_sizes_are_dealt_in_their_order():
    assert deal([5, 5, 5, 5], 2) == [[0, 3], [1, 2]]


token_ids = st.lists(st.integers(0, 9), min_size=1, max_size=12)


@st.composite
def drawn_pairs(draw: st.DrawFn) -> list[Pair]:
    objective = draw(st.sampled_from(["dpo", "sft", "sami"]))
    rejected = draw(st.integers(1, 3))
    rows = [
        {
            "pair_id": str(number),
            "prompt_token_ids": draw(token_ids),
            "chosen_token_ids": draw(token_ids),
            "rejected_token_ids": [draw(token_ids) for _ in range(rejected)],
            "mismatched_prompt_token_ids": [draw(token_ids) for _ in range(rejected)],
        }
        for number in range(draw(st.integers(0, 8)))
    ]
    return [read_pair(row, objective) for row in rows]


def names(groups: list[list[Pair]]) -> list[str]:
    return sorted(pair.pair_id for group in groups for pair in group)


@pytest.mark.parametrize("layout", ["padded", "packed", "shared"])
@settings(max_examples=50)
@given(pairs=drawn_pairs(), most_tokens=st.integers(1, 300))
def test_micro_batches_hold_every_pair_once_within_the_budget(layout, pairs, most_tokens):
    groups = micro_batches(pairs, layout=layout, most_tokens=most_tokens)
    assert names(groups) == sorted(pair.pair_id for pair in pairs)
    for number, group in enumerate(groups):
        trees = [tree for pair in group for tree in pair.trees]
        tokens = lay_out(trees, layout).input_ids.numel()
        assert laid_out_tokens([tree.lengths for tree in trees], layout) == tokens
        assert len(group) == 1 or tokens <= most_tokens
        # A group is closed only when the next pair does not fit.
        if number + 1 < len(groups):
            more = [*trees, *groups[number + 1][0].trees]
            assert lay_out(more, layout).input_ids.numel() > most_tokens


@settings(max_examples=50)
@given(pairs=drawn_pairs())
def test_pairs_of_like_length_are_put_together(pairs):
    """In layout padded, where it matters: rows grow from group to group."""
    groups = micro_batches(pairs, layout="padded", most_tokens=100)
    in_order = [laid_out_tokens(pair.lengths, "padded") for group in groups for pair in group]
    assert in_order == sorted(in_order)


@given(st.lists(st.lists(st.integers(), min_size=1, max_size=6), max_size=5), st.integers(0, 12))
def test_groups_are_split_to_a_count_without_losing_a_pair(sizes, more):
    numbers = iter(range(100))
    groups = [[Pair(str(next(numbers)), ()) for _ in group] for group in sizes]
    found = in_groups(groups, len(groups) + more)
    assert len(found) == len(groups) + more
    assert names(found) == names(groups)
    # None is empty while another one could be halved.
    assert all(found) or max(len(group) for group in found) <= 1
    assert [len(group) for group in groups] == [len(group) for group in sizes]  # what went in is left alone


def test_the_largest_group_is_halved_first():
    pairs = [Pair(str(number), ()) for number in range(7)]
    found = in_groups([pairs[:2], pairs[2:]], 3)
    assert [[pair.pair_id for pair in group] for group in found] == [["0", "1"], ["2", "3"], ["4", "5", "6"]]


def test_a_worker_without_pairs_gets_empty_groups():
    assert in_groups([], 3) == [[], [], []]
