"""The scorers of a stage: a pool of actors that end with it, or clients of one that lives as long as the run.

One that lives loads the initial model once, and torch, which takes longer than a small model; it takes each new policy
in the place of the last. `planning.lifetime` says where there is one.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator
from dataclasses import replace

import pyarrow as pa
import ray
import ray.data
from ray.data import ActorPoolStrategy

from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.monitoring.events import Events
from mipo_ray.ray_cluster.blocks import map_actors, map_clients
from mipo_ray.ray_cluster.living import Lease, LivingActors
from mipo_ray.ray_cluster.resources import Resources, scorer_request
from mipo_ray.session import Stage


@contextlib.contextmanager
def scorers_of_run(config: Config, resources: Resources, *, keeps_scorers: bool) -> Iterator[LivingActors | None]:
    """A scorer that outlives the stages of a run, until the block ends; None: every stage starts its own."""
    if not keeps_scorers:
        yield None
        return
    # It works while the engines wait, and reserves nothing: what it takes is memory.
    living = LivingActors(LivingScorer, (), replace(scorer_request(config, resources), cpus=0.0))
    try:
        yield living
    finally:
        living.end()


def score_blocks(blocks: ray.data.Dataset, models: dict[str, str], stage: Stage) -> ray.data.Dataset:
    """Adds the log-probs by `models` (name -> path) to every block, through the scorers of the stage's run; lazy."""
    config, resources = stage.config, stage.session.resources
    settings = ScorerSettings(
        models=models,
        dtype=resources.dtype,
        batch_size=config.evaluate.scoring_batch_size,
        on_gpu=resources.on_gpu,
        trust_remote_code=config.model.trust_remote_code,
        by_token=("initial",),  # for what is measured of parts of an answer (`effects`)
    )
    pool = ActorPoolStrategy(min_size=1, max_size=config.evaluate.scorers)
    if (living := stage.session.living_scorers) is not None:
        return map_clients(blocks, LeasedScorer, (living.lease(), settings, stage.events), pool=pool)
    return map_actors(
        blocks,
        Scorer,
        (settings, stage.events, resources.gpus_per_engine),
        request=scorer_request(config, resources),
        pool=pool,
        wait_minutes=config.ray.wait_timeout_minutes,
    )


class LivingScorer:
    """A Ray actor with a scorer, which it makes when it is first told what to hold."""

    _scorer: Scorer | None = None

    def hold(self, settings: ScorerSettings, events: Events) -> None:
        """Makes the scorer one of these models."""
        if self._scorer is None:
            self._scorer = Scorer(settings, events)
        else:
            self._scorer.hold(settings, events)

    def score(self, block: pa.Table) -> pa.Table:
        """See `Scorer.__call__`."""
        assert self._scorer is not None
        return self._scorer(block)

    def close(self) -> None:
        """Nothing was started that would outlive the actor."""


class LeasedScorer:
    """A Ray Data actor that has its blocks scored by one that outlives the stage."""

    def __init__(self, lease: Lease, settings: ScorerSettings, events: Events):
        self._lease = lease
        self._actor = lease.take()
        ray.get(self._actor.hold.remote(settings, events))

    def __call__(self, block: pa.Table) -> pa.Table:
        """See `Scorer.__call__`."""
        try:
            scored: pa.Table = ray.get(self._actor.score.remote(block))
        except ray.exceptions.RayActorError:
            # Ray restarts an actor elsewhere only after a system error; the new client tells a new scorer what to hold.
            os._exit(1)
        return scored

    def __del__(self) -> None:
        # Ray Data makes a pool smaller while the rest of it goes on: another actor may need the scorer.
        if (lease := getattr(self, "_lease", None)) is not None:
            with contextlib.suppress(Exception):  # Ray may be gone by then, and nobody is left to be told
                lease.give_back()
