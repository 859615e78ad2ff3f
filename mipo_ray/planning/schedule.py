"""What a run does at the same time: whether training takes a round's pairs while others are still being generated, and
whether a policy is evaluated while the next round's pairs are sampled from it.

Arithmetic over what the configuration asks for and what the nodes have. No torch, no Ray.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

from mipo_ray.conditioning.blocks import rows_per_block
from mipo_ray.config.schema import Config
from mipo_ray.planning.lifetime import Lifetime, no_memory, no_room
from mipo_ray.ray_cluster.resources import (
    Node,
    ResourceError,
    Resources,
    engine_request,
    judge_request,
    scorer_request,
    worker_request,
)


@dataclass(frozen=True)
class Schedule:
    """Whether rounds stream, and why."""

    streams: bool
    why: str

    def __str__(self) -> str:
        return f"{'streaming' if self.streams else 'sequential'} ({self.why})"


@dataclass(frozen=True)
class Overlap:
    """Whether a policy is evaluated while the next round's pairs are sampled from it, and why."""

    is_on: bool
    why: str

    def __str__(self) -> str:
        return f"{'overlapping' if self.is_on else 'sequential'} ({self.why})"


def round_schedule(
    config: Config, resources: Resources, nodes: Sequence[Node] | None, rows: int, engines: int
) -> Schedule:
    """How the rounds run, as `schedule` says or, where it says auto, as nodes and prompts allow.

    nodes: None where it is not known which there will be. rows: the training prompts. engines: how many there may be at
    once. Raises ResourceError where rounds are to stream and engines and training workers do not fit at once.
    """
    if config.pairs.path is not None:
        return Schedule(False, "the pairs exist")
    if config.schedule == "sequential":
        return Schedule(False, "schedule")
    missing = "" if nodes is None or config.ray.autoscaling else _what_is_missing(config, resources, nodes, engines)
    if config.schedule == "streaming":
        if missing:
            raise ResourceError(f"schedule=streaming: {missing}; set it to sequential, or add nodes")
        return Schedule(True, "schedule")
    if nodes is None or config.ray.autoscaling:
        return Schedule(False, "nodes on demand")
    if config.train.reference_mode == "cached":
        return Schedule(False, "train.reference_mode=cached takes all pairs before the first step")
    if resources.gpus_per_engine < 1 or resources.gpus_per_worker < 1:
        return Schedule(False, "engines and workers have no GPUs of their own")
    blocks = math.ceil(rows / rows_per_block(rows, config.conditioning.block_size))
    pool = config.generation.pool
    if blocks <= engines * pool.batches_in_flight:
        return Schedule(False, f"{engines} engines sample all {blocks} blocks at once")
    return Schedule(not missing, missing or "engines and workers fit at once")


def _what_is_missing(config: Config, resources: Resources, nodes: Sequence[Node], engines: int) -> str:
    """Why so many engines and the training workers do not fit at once; "" where they do."""
    # All of them, and not the fewest: the pool grows while the workers still wait for their places.
    every = replace(engine_request(config, resources), fewest=engines)
    room = no_room(every, worker_request(config, resources), nodes)
    return room or no_memory(config, resources, nodes, workers=config.train.num_workers)


def evaluation_overlap(
    config: Config, resources: Resources, nodes: Sequence[Node] | None, lifetime: Lifetime
) -> Overlap:
    """Whether evaluation overlaps the next round's generation, as `evaluate.schedule` says or, where it says auto, as
    the nodes allow.

    nodes: None where it is not known which there will be. lifetime: of the engines, which both ask.
    Raises ResourceError where it is to overlap, and engines end with their stage or leave no place for a scorer.
    """
    chosen = config.evaluate.schedule
    if not config.evaluate.enabled:
        return Overlap(False, "nothing is evaluated")
    if config.pairs.path is not None:
        return Overlap(False, "the pairs exist")
    if config.guard.when_bad is not None:
        return Overlap(False, "the guard decides before a round begins")
    if chosen == "sequential":
        return Overlap(False, "evaluate.schedule")
    missing = "" if lifetime.is_run else f"engines live for the {lifetime}"
    is_known = nodes is not None and not config.ray.autoscaling
    if nodes is not None and is_known and not missing:
        missing = _no_scorer_beside(config, resources, nodes, lifetime)
    if chosen == "overlapping":
        if missing:
            raise ResourceError(f"evaluate.schedule=overlapping: {missing}; set it to sequential, or add nodes")
        return Overlap(True, "evaluate.schedule")
    if not is_known:
        return Overlap(False, "nodes on demand")
    if resources.gpus_per_engine < 1:
        return Overlap(False, "engines and scorers have no GPUs of their own")
    return Overlap(not missing, missing or "engines and scorers fit at once")


def _no_scorer_beside(config: Config, resources: Resources, nodes: Sequence[Node], lifetime: Lifetime) -> str:
    """Why all engines that there may be and what else an evaluation starts may not fit at once; "" where they do."""
    # All of them, and not the fewest: a scorer that waits until generation ends waits in vain, or for too long.
    every = replace(engine_request(config, resources), fewest=lifetime.most)
    others = [] if lifetime.keeps_scorers else [scorer_request(config, resources)]
    others += [judge_request(config, resources)] if config.evaluate.judge.has_own_engines else []
    return next((what for other in others if (what := no_room(every, other, nodes))), "")
