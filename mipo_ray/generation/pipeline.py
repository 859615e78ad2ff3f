"""The pool of vLLM actors as one step of a Ray Data pipeline."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import ray.data

from mipo_ray.config import Config
from mipo_ray.config.generation import EnginePoolConfig, SamplingConfig
from mipo_ray.generation.sampler import Sampler, ToScore
from mipo_ray.generation.vllm_arguments import EngineSettings, engine_settings
from mipo_ray.monitoring.events import Events
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors
from mipo_ray.ray_cluster.resources import Request, Resources, engine_request


@dataclass(frozen=True)
class Engines:
    """A pool of engines of one model: how each is started, what it reserves, how many there are and how long the first
    may wait for a node."""

    settings: EngineSettings
    request: Request
    pool: EnginePoolConfig
    wait_minutes: float


def policy_engines(config: Config, policy: str, resources: Resources) -> Engines:
    """The engines that sample from a policy (any model path), in the run's own window."""
    return Engines(
        settings=engine_settings(config, policy, resources),
        request=engine_request(config, resources),
        pool=config.generation.pool,
        wait_minutes=config.ray.wait_timeout_minutes,
    )


def sample_responses(
    rows: ray.data.Dataset,
    engines: Engines,
    sampling: Mapping[str, SamplingConfig],
    events: Events,
    to_score: ToScore | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through a pool of vLLM actors; a block stays a block.

    sampling: parameters by the name that requests give (`sampler.REQUESTS`); those of DEFAULT_SAMPLING hold where they
    give none. With `to_score` also `scores`: log-probs of the responses that it gives for each block.
    """
    return map_actors(
        rows,
        Sampler,
        (engines.settings, sampling, events, to_score, engines.request.gpus),
        request=engines.request,
        pool=engine_pool(engines.pool),
        wait_minutes=engines.wait_minutes,
    )
