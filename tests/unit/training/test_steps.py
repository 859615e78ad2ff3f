"""Steps cut from blocks of pairs that arrive one after the other.

python -m pytest tests/unit/training/test_steps.py
"""

from __future__ import annotations

import math

import pyarrow as pa
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.training.steps import ReadBlock, cut_steps

# (pairs kept, rows that might have given one) of each block.
BLOCKS = st.lists(
    st.integers(0, 12).flatmap(lambda rows: st.tuples(st.integers(0, rows), st.just(rows))), min_size=1, max_size=12
)


def read_blocks(counts: list[tuple[int, int]]) -> list[ReadBlock]:
    blocks, first = [], 0
    for kept, candidates in counts:
        blocks.append(
            ReadBlock(
                pa.table({"pair": list(range(first, first + kept))}, pa.schema([("pair", pa.int64())])), candidates
            )
        )
        first += kept
    return blocks


@given(BLOCKS, st.integers(1, 9))
def test_steps_hold_every_pair_once_in_order_and_only_the_last_is_smaller(
    counts: list[tuple[int, int]], batch_size: int
) -> None:
    steps = list(cut_steps(read_blocks(counts), sum(rows for _, rows in counts), batch_size))
    sizes = [step.num_rows for step, _ in steps]
    kept = sum(kept for kept, _ in counts)
    assert [pair for step, _ in steps for pair in step["pair"].to_pylist()] == list(range(kept))
    assert sizes[:-1] == [batch_size] * (len(sizes) - 1)
    assert len(sizes) == math.ceil(kept / batch_size)


@given(BLOCKS, st.integers(1, 9))
def test_a_step_always_fits_into_the_epoch_that_it_is_told_of(counts: list[tuple[int, int]], batch_size: int) -> None:
    """The learning rate's schedule refuses a step behind its end. No more pairs are expected than might come."""
    taken = 0
    for step, epoch_pairs in cut_steps(read_blocks(counts), sum(rows for _, rows in counts), batch_size):
        taken += step.num_rows
        assert taken <= epoch_pairs <= sum(rows for _, rows in counts)


@given(BLOCKS, st.integers(1, 9))
def test_what_is_expected_is_exact_with_the_last_block(counts: list[tuple[int, int]], batch_size: int) -> None:
    steps = list(cut_steps(read_blocks(counts), sum(rows for _, rows in counts), batch_size))
    kept, before_last = sum(kept for kept, _ in counts), sum(kept for kept, _ in counts[:-1])
    with_last = [expected for number, (_, expected) in enumerate(steps) if (number + 1) * batch_size > before_last]
    assert set(with_last) <= {kept}


def test_steps_are_cut_as_soon_as_their_pairs_are_there() -> None:
    """A step waits for no block behind its own: training begins with the first block."""
    read = []

    def arriving():
        for block in read_blocks([(3, 4), (3, 4), (0, 4), (4, 4)]):
            read.append(block)
            yield block

    steps = cut_steps(arriving(), 16, batch_size=2)
    blocks_read = [(step["pair"].to_pylist(), expected, len(read)) for step, expected in steps]
    # 3 of 4 rows kept: 12 of 16 are expected; 6 of 12 after the block that gave none: those are steps of later blocks.
    assert blocks_read == [([0, 1], 12, 1), ([2, 3], 12, 2), ([4, 5], 12, 2), ([6, 7], 10, 4), ([8, 9], 10, 4)]
