"""The pool of vLLM actors as one step of a Ray Data pipeline."""

from __future__ import annotations

from collections.abc import Mapping

import ray.data

from mipo_ray.config.generation import SamplingConfig
from mipo_ray.config.schema import Config
from mipo_ray.generation.sampler import DEFAULT_SAMPLING, Sampler, ToScore
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.monitoring.events import Events
from mipo_ray.ray_cluster.blocks import engine_pool, map_actors
from mipo_ray.ray_cluster.resources import Resources, engine_request


def sample_responses(
    rows: ray.data.Dataset,
    config: Config,
    *,
    policy: str,
    resources: Resources,
    events: Events,
    to_score: ToScore | None = None,
    sampling: Mapping[str, SamplingConfig] | None = None,
) -> ray.data.Dataset:
    """Adds `responses` to rows with `requests`, through the pool of vLLM actors; a block stays a block.

    With `to_score` also `scores`: log-probs of the responses that it gives for each block. `sampling`: parameters by
    the name that requests give (engine.REQUESTS), beside `generation.sampling`, which holds where they give none.
    """
    settings = engine_settings(config, policy, resources)
    named_sampling = {**(sampling or {}), DEFAULT_SAMPLING: config.generation.sampling}
    return map_actors(
        rows,
        Sampler,
        (settings, named_sampling, events, to_score, resources.gpus_per_engine),
        request=engine_request(config, resources),
        pool=engine_pool(config.generation.pool),
        wait_minutes=config.ray.wait_timeout_minutes,
    )
