"""The optimizer steps of a round as one worker takes them: its pairs, and how many all workers have. No Ray, no torch.

Either all pairs are known when training begins, or they are still being generated (`cut_steps`): then a step is told
how many pairs its epoch will have by what is known so far.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

import pyarrow as pa

from mipo_ray.training.layout import Pair
from mipo_ray.training.worker_settings import WorkerSettings


@dataclass(frozen=True)
class Step:
    """One optimizer step of one worker."""

    pairs: Sequence[Pair]
    """This worker's."""
    step_pairs: int
    """Pairs of the step over all workers."""
    epoch_pairs: int
    """Pairs of the epoch over all workers, as far as that is known when the step is taken."""


# From an epoch to this worker's optimizer steps in it, in order.
Steps = Callable[[int], Iterable[Step]]


def known_steps(settings: WorkerSettings, pairs_in_epoch: Callable[[int], Iterable[Sequence[Pair]]]) -> Steps:
    """The steps of a round whose pairs are all there: `settings.pair_count` in each epoch.

    `pairs_in_epoch(epoch)` streams this worker's pairs of every step of that epoch. The steps raise ValueError where
    they are more or fewer than that count says: workers with different numbers of steps would wait for each other for
    ever.
    """
    assert settings.pair_count is not None
    assert settings.steps_per_epoch is not None
    total, expected = settings.pair_count, settings.steps_per_epoch
    batch_size = settings.train.batch_size

    def steps(epoch: int) -> Iterator[Step]:
        found = 0
        for pairs in pairs_in_epoch(epoch):
            if found == expected:
                raise ValueError(f"epoch {epoch}: expected {expected} steps for this worker, found more")
            yield Step(pairs, min(batch_size, total - found * batch_size), total)
            found += 1
        if found < expected:
            raise ValueError(f"epoch {epoch}: expected {expected} steps for this worker, found {found}")

    return steps


def steps_of(pairs: Sequence[Pair], batch_size: int) -> Iterator[Sequence[Pair]]:
    """All pairs of an epoch as the pairs of each step of one worker."""
    for start in range(0, len(pairs), batch_size):
        yield pairs[start : start + batch_size]


@dataclass(frozen=True)
class ReadBlock:
    """The kept pairs of one conditioning block in training order, of `candidates` rows that might have given some."""

    pairs: pa.Table
    candidates: int


def cut_steps(blocks: Iterable[ReadBlock], candidates: int, batch_size: int) -> Iterator[tuple[pa.Table, int]]:
    """Steps of `batch_size` pairs from blocks that come one after the other, the last one perhaps smaller.

    `candidates`: the rows of all blocks that may give a pair. Beside each step stands how many pairs the epoch will
    have if the blocks that are not read yet keep the share of their candidates that those read so far have kept,
    rounded: a figure that depends on the pairs alone and not on when they came, and that is exact with the last block.
    """
    waiting: list[pa.Table] = []
    seen = kept = ready = 0
    for block in blocks:
        seen += block.candidates
        kept += block.pairs.num_rows
        ready += block.pairs.num_rows
        waiting.append(block.pairs)
        if ready < batch_size:
            continue
        expected = kept + (2 * kept * (candidates - seen) + seen) // (2 * seen)
        pairs = pa.concat_tables(waiting)
        for start in range(0, ready - batch_size + 1, batch_size):
            yield pairs.slice(start, batch_size), expected
        waiting, ready = [pairs.slice(ready - ready % batch_size)], ready % batch_size
    if ready:
        yield pa.concat_tables(waiting), kept
