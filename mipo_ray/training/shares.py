"""How a round's pairs reach its training workers: Ray Data shares every optimizer step out to those that are there."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import ray.data
import ray.train

from mipo_ray.config.train import TrainConfig
from mipo_ray.ray_cluster.blocks import map_blocks
from mipo_ray.training.batching import deal
from mipo_ray.training.layout import MISMATCHED_PROMPTS, PAIR_COLUMNS, Pair, laid_out_tokens, pair_trees


class StepShares(ray.train.DataConfig):
    """Gives every worker its share of every optimizer step, whatever number of workers Ray Train starts.

    The rows of a dataset are pairs in training order: step k trains on rows k * batch_size to (k + 1) * batch_size.
    What a worker streams is read by `own_steps`.
    """

    def __init__(self, train: TrainConfig):
        super().__init__(execution_options=ray.data.ExecutionOptions(preserve_order=True))
        self._train = train

    def configure(
        self, datasets: dict[str, ray.data.Dataset], world_size: int, *arguments: Any, **options: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Called by Ray Train each time that it starts workers."""
        shared = {name: _in_shares(pairs, self._train, world_size) for name, pairs in datasets.items()}
        return super().configure(shared, world_size, *arguments, **options)


def own_steps(shard: ray.data.DataIterator, train: TrainConfig, workers: int) -> Iterator[list[Pair]]:
    """A worker's pairs of each step of one epoch, from its split of a `StepShares` dataset."""
    for share in shard.iter_batches(batch_size=_share_rows(train, workers), batch_format="pyarrow", prefetch_batches=1):
        yield [pair for pair in _pairs(share) if pair["pair_id"]]


def share_out(step: pa.Table, *, train: TrainConfig, workers: int) -> pa.Table:
    """The pairs of one step, worker after worker, each share filled up to equally many rows.

    Shares have equally many pairs, give or take one, and nearly equally many tokens, as they are laid out; what fills
    them up has an empty `pair_id`.
    """
    rows = _share_rows(train, workers)
    sizes = [laid_out_tokens(pair_trees(pair, train.objective), train.layout) for pair in _pairs(step)]
    empty: dict[str, Any] = {name: [] for name in step.column_names} | {"pair_id": ""}
    filler = pa.Table.from_pylist([empty] * rows, step.schema)
    parts = []
    for indices in deal(sizes, workers):
        parts += [step.take(pa.array(indices, pa.int64())), filler.slice(0, rows - len(indices))]
    return pa.concat_tables(parts).combine_chunks()


def _in_shares(pairs: ray.data.Dataset, train: TrainConfig, workers: int) -> ray.data.Dataset:
    """Blocks of one worker's share of one step.

    With the order preserved, the split deals blocks to the workers in turn, and since they all have equally many rows
    it neither cuts one nor leaves any out.
    """
    columns = [*PAIR_COLUMNS, *([MISMATCHED_PROMPTS] if train.objective == "sami" else [])]
    steps = pairs.select_columns(columns).repartition(target_num_rows_per_block=train.batch_size, strict=True)
    shares = map_blocks(steps, share_out, train=train, workers=workers)
    return shares.repartition(target_num_rows_per_block=_share_rows(train, workers), strict=True)


def _share_rows(train: TrainConfig, workers: int) -> int:
    return math.ceil(train.batch_size / workers)


def _pairs(table: pa.Table) -> list[Pair]:
    columns = [[_value(scalar) for scalar in table[name]] for name in table.column_names]
    return [dict(zip(table.column_names, row, strict=True)) for row in zip(*columns, strict=True)]


def _value(scalar: pa.Scalar) -> Any:
    """An id as a string, token ids as an array [tokens], several responses or prompts as a list of such arrays."""
    if not pa.types.is_nested(scalar.type):
        return scalar.as_py()
    values = scalar.values
    return [_value(item) for item in values] if pa.types.is_nested(values.type) else np.asarray(values)
