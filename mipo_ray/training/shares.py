"""How a round's pairs reach its training workers: from their files, in training order, shared out step by step.

A step holds the same pairs however many workers share it, and its gradient, which is normalised by the pairs of all
workers, is the same.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.fs
import ray.data
import ray.train

from mipo_ray.config.schema import Config
from mipo_ray.config.train import Objective, TrainConfig
from mipo_ray.errors import UserError
from mipo_ray.pairs.label_control import shuffle_labels
from mipo_ray.pairs.schema import SAMPLER_LOGPROB, kept_pairs, missing_columns, pair_columns
from mipo_ray.ray_cluster.blocks import map_blocks, ordered_context
from mipo_ray.ray_cluster.growth import keep_to_group
from mipo_ray.ray_cluster.tables import read_rows
from mipo_ray.tables.parquet import open_table
from mipo_ray.training.layout import Pair, laid_out_tokens, read_lengths, read_pairs

# A partition of the sort: some 50 MB of pairs.
_PARTITION_ROWS = 10_000
_MOST_PARTITIONS = 200


def stream_kept_pairs(
    files: Sequence[str],
    filesystem: pyarrow.fs.FileSystem,
    objective: Objective,
    *,
    only: frozenset[str] | None = None,
    shuffle_seed: int | None = None,
) -> ray.data.Dataset:
    """Pairs that no filter dropped, with the columns of the objective, by pair_id, which is a seeded shuffle.

    `only`: the pair_ids to keep; None: all. With `shuffle_seed` the labels of a seeded half are swapped. Raises
    UserError where the objective reads a column that the pairs were written without.
    """
    columns = stored_columns(files[0], filesystem, objective)
    with ordered_context() as context:
        # Ray Data sorts into 200 partitions, a task each, however few the rows are.
        rows = open_table(files, filesystem).count_rows()
        context.default_hash_shuffle_parallelism = min(_MOST_PARTITIONS, 1 + rows // _PARTITION_ROWS)
        dataset = read_rows(files, filesystem, columns)
        pairs = map_blocks(dataset, _kept_only, only=only, shuffle_seed=shuffle_seed).sort("pair_id")
        # Right behind a sort Ray Data 2.60 cuts each of the sort's partitions by itself, where a strict repartition was
        # to cut the whole: whatever stands between the two keeps them apart.
        return pairs.select_columns([name for name in columns if name != "dropped"])


def stored_columns(file: str, filesystem: pyarrow.fs.FileSystem, objective: Objective) -> list[str]:
    """What is read of a file of pairs: the columns of the objective, `dropped`, and the sampler's log-prob where it is
    there. Raises UserError for a file that lacks a column of the objective: Ray Data would leave it out silently."""
    columns = [*pair_columns(objective), "dropped"]
    found = open_table([file], filesystem).schema.names
    columns += [SAMPLER_LOGPROB] if SAMPLER_LOGPROB in found else []
    if missing := missing_columns(columns, found):
        raise UserError(f"{file}: train.objective {objective}: {missing}; generate these pairs again")
    return columns


class StepShares(ray.train.DataConfig):
    """Gives every worker its share of every optimizer step, whatever number of workers Ray Train starts.

    The rows of a dataset are pairs in training order: step k trains on rows k * batch_size to (k + 1) * batch_size.
    What a worker streams is read by `own_steps`.
    """

    def __init__(self, config: Config):
        options = ray.data.ExecutionOptions(preserve_order=True)
        keep_to_group(options, config, training=True)
        super().__init__(execution_options=options)
        self._train = config.train

    def configure(
        self, datasets: dict[str, ray.data.Dataset], world_size: int, *arguments: Any, **options: Any
    ) -> list[dict[str, ray.data.DataIterator]]:
        """Called by Ray Train each time that it starts workers."""
        shared = {name: _in_shares(pairs, self._train, world_size) for name, pairs in datasets.items()}
        return super().configure(shared, world_size, *arguments, **options)


def own_steps(shard: ray.data.DataIterator, train: TrainConfig, workers: int) -> Iterator[list[Pair]]:
    """A worker's pairs of each step of one epoch, from its split of a `StepShares` dataset."""
    share: Any  # a table; Ray's annotation does not tell
    for share in shard.iter_batches(batch_size=_share_rows(train, workers), batch_format="pyarrow", prefetch_batches=1):
        yield read_pairs(share.filter(pc.not_equal(share["pair_id"], "")), train.objective)


def share_out(step: pa.Table, *, train: TrainConfig, workers: int) -> pa.Table:
    """The pairs of one step, worker after worker, each share filled up to equally many rows.

    Shares have equally many pairs, give or take one, and nearly equally many tokens, as they are laid out; what fills
    them up has an empty `pair_id`.
    """
    rows = _share_rows(train, workers)
    wanted = (*pair_columns(train.objective), SAMPLER_LOGPROB)
    step = step.select([name for name in wanted if name in step.column_names])
    empty: dict[str, Any] = {name: [] for name in step.column_names} | {"pair_id": "", SAMPLER_LOGPROB: None}
    filler = pa.Table.from_pylist([empty] * rows, step.schema)
    parts = []
    for indices in deal_step(step, train, workers):
        parts += [step.take(pa.array(indices, pa.int64())), filler.slice(0, rows - len(indices))]
    return pa.concat_tables(parts).combine_chunks()


def deal_step(step: pa.Table, train: TrainConfig, workers: int) -> list[list[int]]:
    """Which rows of a step each worker gets: `deal` by the tokens that they take, as they are laid out."""
    return deal([laid_out_tokens(lengths, train.layout) for lengths in read_lengths(step, train.objective)], workers)


def deal(sizes: Sequence[int], workers: int) -> list[list[int]]:
    """Which pairs of a step each worker gets: indices into `sizes` (tokens), largest first.

    Each worker gets len(sizes) / workers pairs, rounded up or down. They are dealt in decreasing order, there and back
    again (0, 1, 2, 2, 1, 0, ...), so that the sums of tokens are close.
    """
    order = sorted(range(len(sizes)), key=lambda index: (-sizes[index], index))
    shares: list[list[int]] = [[] for _ in range(workers)]
    for position, index in enumerate(order):
        lap, place = divmod(position, workers)
        shares[place if lap % 2 == 0 else workers - 1 - place].append(index)
    return shares


def _in_shares(pairs: ray.data.Dataset, train: TrainConfig, workers: int) -> ray.data.Dataset:
    """Blocks of one worker's share of one step.

    With the order preserved, the split deals blocks to the workers in turn, and since they all have equally many rows
    it neither cuts one nor leaves any out.
    """
    steps = pairs.repartition(target_num_rows_per_block=train.batch_size, strict=True)
    shares = map_blocks(steps, share_out, train=train, workers=workers)
    return shares.repartition(target_num_rows_per_block=_share_rows(train, workers), strict=True)


def _share_rows(train: TrainConfig, workers: int) -> int:
    return math.ceil(train.batch_size / workers)


def kept_in_order(block: pa.Table, shuffle_seed: int | None) -> pa.Table:
    """The pairs of a block that no filter dropped, by pair_id; `shuffle_seed` as in `stream_kept_pairs`."""
    return _kept_only(block, only=None, shuffle_seed=shuffle_seed).sort_by("pair_id").combine_chunks()


def _kept_only(block: pa.Table, *, only: frozenset[str] | None, shuffle_seed: int | None) -> pa.Table:
    kept = kept_pairs(block)
    if only is not None:
        kept = kept.filter(pc.is_in(kept["pair_id"], pa.array(sorted(only), pa.string())))
    return kept if shuffle_seed is None else shuffle_labels(kept, shuffle_seed)
