"""How much disk a run needs: the run directory's and that of each training node, by the formula of what is written.

Checkpoints and policies are nearly all of it; pairs, scores and the report are small beside them. The formula is held
against what DeepSpeed writes by tests/integration/test_estimates_measured.py. No torch, no Ray.
"""

from __future__ import annotations

import math
import shutil
from dataclasses import dataclass

from mipo_ray.config.schema import Config
from mipo_ray.config.train import TrainConfig
from mipo_ray.models.shape import ModelShape, model_shape
from mipo_ray.planning.estimates import BYTES, lora_parameters, size
from mipo_ray.ray_cluster.resources import ResourceError
from mipo_ray.storage.local_files import where_to_make
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import RunDirectory

# Ray Train keeps two while a third is being written.
MOST_CHECKPOINTS = 3
# DeepSpeed's universal format, and the pieces it is put together from: the master weights and both moments in float32.
UNIVERSAL_BYTES = 2 * 12


@dataclass(frozen=True)
class Unwritten:
    """What a run has still to write: `pairs` of a round at most; `finished` are the names of its finished stages."""

    config: Config
    dtype: str
    pairs: int
    run: RunDirectory
    finished: tuple[str, ...]


@dataclass(frozen=True)
class DiskNeeds:
    """Bytes. `checkpoint` and `policy`: of one each; `run_directory`: at most, what is there already left out, of which
    `certain` is surely written; `node`: in the temporary directory of each training node, at most."""

    checkpoint: float
    policy: float
    policies: int
    run_directory: float
    certain: float
    node: float


def checkpoint_bytes(shape: ModelShape, train: TrainConfig, dtype: str) -> float:
    """All workers' shards of one checkpoint together: weights that are not sharded, float32 master weights, and Adam's
    two moments.

    With adapters theirs alone, and for a model with a tied head also that, which DeepSpeed does not see as frozen.
    """
    adapters = lora_parameters(shape, train.lora.rank)
    trained = adapters or shape.parameters
    stage = max(train.zero_stage, 1) if dtype == "bfloat16" else train.zero_stage
    weights = 0 if stage == 3 else trained + (shape.vocabulary * shape.hidden if adapters else 0)
    return float(weights * BYTES[dtype] + trained * (12 if stage else 8))


def disk_needs(work: Unwritten, shape: ModelShape) -> DiskNeeds:
    """What is still to be written, of a model of this shape."""
    train, run = work.config.train, work.run
    stages = [run.stage(Round(number), "train") for number in range(work.config.rounds)]
    unfinished = [stage for stage in stages if stage not in work.finished]
    checkpoint, policy = checkpoint_bytes(shape, train, work.dtype), float(shape.parameters * BYTES[work.dtype])
    present = sum(sum(run.list_files(f"{stage}/ray_train").values()) for stage in unfinished)
    most = MOST_CHECKPOINTS if unfinished else 0
    surely = 0
    if train.checkpoint_steps is not None:  # else they follow a clock, and a short round writes none
        surely = min(most, (train.epochs * math.ceil(work.pairs / train.batch_size) - 1) // train.checkpoint_steps)
    trained = lora_parameters(shape, train.lora.rank) or shape.parameters
    # On a path that the nodes see shards are written in place; elsewhere every node fetches all of them to go on.
    fetched = 0.0 if run.is_local else checkpoint + policy
    converted = UNIVERSAL_BYTES * trained if train.min_workers is not None and train.zero_stage else 0
    return DiskNeeds(
        checkpoint=checkpoint,
        policy=policy,
        policies=len(unfinished),
        run_directory=max(0.0, most * checkpoint - present) + len(unfinished) * policy,
        certain=max(0.0, surely * checkpoint - present) + len(unfinished) * policy,
        node=(fetched + converted) if unfinished else 0.0,
    )


def free_bytes(run: RunDirectory) -> int | None:
    """Free bytes of the run directory's filesystem as this machine sees it; None for an object store."""
    return shutil.disk_usage(where_to_make(run.root)[0]).free if run.is_local else None


def check_disk(work: Unwritten) -> None:
    """Raises ResourceError where what is surely written does not fit on the run directory's filesystem."""
    shape, free = model_shape(work.config.model.source), free_bytes(work.run)
    if isinstance(shape, str) or free is None:
        return
    needs = disk_needs(work, shape)
    if needs.certain > free:
        raise ResourceError(
            f"run_dir {work.run.url}: expected at least {size(needs.certain)} of free space ({needs.policies} policies "
            f"of {size(needs.policy)}, checkpoints of {size(needs.checkpoint)} by train.checkpoint_steps), found "
            f"{size(free)}: choose a larger volume, or write less (rounds, train.checkpoint_steps, train.lora.rank)"
        )


def describe_disk(work: Unwritten) -> list[str]:
    """Lines for the plan."""
    shape = model_shape(work.config.model.source)
    if isinstance(shape, str):
        return [f"disk            no estimate: {shape}"]
    needs = disk_needs(work, shape)
    if not needs.policies:
        return []
    free = free_bytes(work.run)
    there = "how much is free there is not known" if free is None else f"{size(free)} are free"
    lines = [
        f"disk            run directory: up to {size(needs.run_directory)} more ({MOST_CHECKPOINTS} checkpoints of "
        f"{size(needs.checkpoint)} while a round trains, {needs.policies} policies of {size(needs.policy)}); {there}"
    ]
    if free is not None and needs.run_directory > free:
        lines.append(
            "disk            not enough for every checkpoint that may be written: a full disk stops the run, and the "
            "same command goes on where there is space"
        )
    if needs.node:
        lines.append(
            f"disk            each training node: up to {size(needs.node)} in its temporary directory, to go on from a "
            "checkpoint"
        )
    return lines
