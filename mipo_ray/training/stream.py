"""How pairs reach the training workers while their round is still being generated: block after block, from the files.

Pairs are durable first and trained on then: a worker reads a block's file once it is complete. The order is that of the
conditioned rows, and inside a block that of pair_id, which is a seeded shuffle; so it is the same whenever the blocks
were finished, and the same policy comes out of files that are all there. Nothing piles up in memory: a worker that is
slower than the engines leaves files behind that are written anyhow, one that is faster waits.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from mipo_ray.errors import UserError
from mipo_ray.pairs.written import WrittenBlocks, conditioned_blocks
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.tables.parquet import open_table
from mipo_ray.training.layout import read_pairs
from mipo_ray.training.shares import deal_step, kept_in_order, stored_columns
from mipo_ray.training.steps import ReadBlock, Step, Steps, cut_steps
from mipo_ray.training.worker_settings import WorkerSettings

POLL_SECONDS = 1.0


@dataclass(frozen=True)
class PairStream:
    """Where the pairs of a round are written; travels to the workers."""

    run: RunDirectory
    stage: str
    """The generate stage's directory, below the run directory; its rows are conditioned."""
    samples_per_prompt: int


def streamed_steps(stream: PairStream, settings: WorkerSettings, rank: int, workers: int) -> Steps:
    """This worker's steps of a round that may still be generated: each epoch waits for the blocks that it has not seen.

    All workers must take the steps together: rank 0 looks which blocks are written and tells the others.
    """
    blocks = conditioned_blocks(stream.run, stream.stage)
    candidates = stream.samples_per_prompt * sum(block.candidates for block in blocks)
    written = WrittenBlocks(stream.run, stream.stage, blocks)
    files: dict[int, str] = {}

    def read_blocks() -> Iterator[ReadBlock]:
        for number, block in enumerate(blocks):
            while number not in files:
                files.update(_told_by_rank_0(written.look() if rank == 0 else {}))
                if number not in files:
                    time.sleep(POLL_SECONDS)
            pairs = _read_block(files[number], stream, settings, block.rows * stream.samples_per_prompt)
            yield ReadBlock(pairs, stream.samples_per_prompt * block.candidates)

    def steps(epoch: int) -> Iterator[Step]:
        train = settings.train
        for step, epoch_pairs in cut_steps(read_blocks(), candidates, train.batch_size):
            own = step.take(pa.array(deal_step(step, train, workers)[rank], pa.int64()))
            yield Step(read_pairs(own, train.objective), step.num_rows, epoch_pairs)

    return steps


def _read_block(file: str, stream: PairStream, settings: WorkerSettings, rows: int) -> pa.Table:
    """The pairs of a block that no filter dropped, in training order; raises UserError for a file of other rows."""
    train, filesystem = settings.train, stream.run.arrow_filesystem()
    columns = stored_columns(file, filesystem, train.objective)
    table = open_table([file], filesystem, columns).to_table(columns=columns)
    if table.num_rows != rows:
        raise UserError(
            f"{file}: expected the {rows} rows of one conditioning block, found {table.num_rows}; "
            "train this round with schedule=sequential"
        )
    seed = settings.seed if train.shuffle_labels else None
    return kept_in_order(table, shuffle_seed=seed)


def _told_by_rank_0(found: dict[int, str]) -> dict[int, str]:
    """What rank 0 found, on every worker."""
    from torch import distributed

    told: list[Any] = [found]
    distributed.broadcast_object_list(told, src=0)
    return dict(told[0])
