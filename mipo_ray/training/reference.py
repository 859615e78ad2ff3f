"""The frozen reference of an objective, in the three ways to have its log-probs.

colocated   a second model beside the policy, sharded (ZeRO-3) or in CPU memory where asked
cached      the same model, run over all pairs before the first update; its log-probs are stored, the model goes
adapter     the policy's own base weights, with its LoRA adapters off
"""

from __future__ import annotations

import gc
import posixpath
from collections.abc import Callable, Iterable, Mapping, Sequence
from fnmatch import fnmatch
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import torch
from torch import Tensor, distributed

from mipo_ray.paths import open_path
from mipo_ray.storage.arrow_files import is_in_bucket
from mipo_ray.storage.faults import named
from mipo_ray.tables.parquet import PAGE_CHECKSUMS, read_table
from mipo_ray.training.adapters import adapters_off
from mipo_ray.training.layout import Pair, TokenBatch

# From a micro-batch, its pairs and their laid-out trees, to the reference's log-probs of its responses: [responses]
# float32, nats, on the batch's device, without gradient. Every worker must call it equally often.
Reference = Callable[[Sequence[Pair], TokenBatch], Tensor]

LOGPROBS_SCHEMA = pa.schema([("pair_id", pa.string()), ("logprobs", pa.list_(pa.float32()))])


def colocated_reference(module: Any) -> Reference:
    """Runs a frozen `ResponseLogprobs`, or a DeepSpeed engine around one."""

    def logprobs(pairs: Sequence[Pair], batch: TokenBatch) -> Tensor:
        with torch.no_grad():
            return module(batch)

    return logprobs


def adapter_reference(engine: Any) -> Reference:
    """Runs the policy of a DeepSpeed engine around `ResponseLogprobs` with its adapters off."""

    def logprobs(pairs: Sequence[Pair], batch: TokenBatch) -> Tensor:
        with torch.no_grad(), adapters_off(engine.module.model):
            return engine.module(batch)

    return logprobs


def cached_reference(logprobs_of: Mapping[str, np.ndarray]) -> Reference:
    """Looks log-probs up by `pair_id`; of a pair all its responses, in the order of its trees.

    Raises KeyError for a pair that is not there.
    """

    def logprobs(pairs: Sequence[Pair], batch: TokenBatch) -> Tensor:
        if not pairs:  # a micro-batch that only keeps a worker in step with the others
            return torch.zeros(batch.response_count, device=batch.input_ids.device)
        values = np.concatenate([logprobs_of[pair.pair_id] for pair in pairs])
        return torch.from_numpy(values).to(batch.input_ids.device)

    return logprobs


def compute_logprobs(
    reference: Reference, micro_batches: Iterable[tuple[Sequence[Pair], TokenBatch]]
) -> dict[str, np.ndarray]:
    """By pair_id, the log-probs [responses] float32 of every pair; micro-batches without pairs are run all the same."""
    found: dict[str, np.ndarray] = {}
    for pairs, batch in micro_batches:
        values = reference(pairs, batch).float().cpu().numpy()
        if pairs:
            for pair, own in zip(pairs, np.split(values, len(pairs)), strict=True):
                found[pair.pair_id] = own
    return found


def write_logprobs(directory: str, logprobs: Mapping[str, np.ndarray]) -> None:
    """Writes this worker's part of the cache to `directory` (a path or any URL that fsspec opens), one Parquet file."""
    filesystem, root = open_path(directory)
    table = pa.table(
        {"pair_id": list(logprobs), "logprobs": [values.tolist() for values in logprobs.values()]}, LOGPROBS_SCHEMA
    )
    place = f"{root}/worker-{distributed.get_rank():05d}.parquet"
    with named(place, "written"):
        if not is_in_bucket(filesystem):
            filesystem.makedirs(root, exist_ok=True)
        with filesystem.open(place, "wb") as file:
            pyarrow.parquet.write_table(table, file, **PAGE_CHECKSUMS)


def read_logprobs(directory: str, pair_count: int) -> dict[str, np.ndarray] | None:
    """The whole cache, of all workers; None where it does not hold all `pair_count` pairs."""
    filesystem, root = open_path(directory)
    filesystem.invalidate_cache()
    if not filesystem.isdir(root):
        return None
    found: dict[str, np.ndarray] = {}
    # Listed and not matched: a name above may hold the characters of a pattern.
    files = filesystem.ls(root, detail=False)
    for path in sorted(file for file in files if fnmatch(posixpath.basename(file), "worker-*.parquet")):
        try:
            with filesystem.open(path, "rb") as file:
                table = read_table(file, path)
        except pa.ArrowInvalid:  # a worker was killed while it wrote
            return None
        if not table.schema.equals(LOGPROBS_SCHEMA):
            return None
        if not table.num_rows:  # of a worker without a pair
            continue
        lists = table["logprobs"].combine_chunks()
        rows = np.split(lists.flatten().to_numpy(), np.cumsum(lists.value_lengths().to_numpy())[:-1])
        found.update(zip(table["pair_id"].to_pylist(), rows, strict=True))
    return found if len(found) == pair_count else None


def release_weights(module: Any) -> None:
    """Gives back the memory of a model that is not used any more, `ResponseLogprobs` or a DeepSpeed engine around it.

    DeepSpeed keeps a sharded engine alive in closures of its own, so that to forget it would free nothing.
    """
    for parameter in module.parameters():
        for tensor in (parameter, getattr(parameter, "ds_tensor", None)):
            if tensor is not None:
                tensor.data = torch.empty(0, dtype=tensor.dtype, device=tensor.device)
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
