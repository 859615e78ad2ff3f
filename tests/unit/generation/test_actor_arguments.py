"""What an actor is made with is small: Ray sends it again whenever it starts the actor anew.

python -m pytest tests/unit/generation/test_actor_arguments.py
"""

from __future__ import annotations

import functools
from typing import Any

import pytest
from ray import cloudpickle

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.held_out.scorer import Scorer, ScorerSettings
from mipo_ray.generation.actor_engines import EngineUse
from mipo_ray.generation.embedder import Embedder
from mipo_ray.generation.engine import DEFAULT_SAMPLING, Sampling
from mipo_ray.generation.sampler import Sampler
from mipo_ray.generation.vllm_arguments import engine_settings
from mipo_ray.pairs.assemble import to_score
from mipo_ray.ray_cluster.resources import resolve

INLINE_BYTES = 100 * 1024  # what Ray sends with a call, and does not store

CONFIG = load_config(overrides=["filters.patterns=[{name: refusal, regex: cannot}]", "generation.score_pmi=true"])
LONG = "prompts.exemplars=[" + ", ".join(["{question: " + "q" * 4000 + ", answer: a}"] * 50) + "]"


def actor_arguments(config: Config) -> dict[type, tuple[Any, ...]]:
    settings = engine_settings(config, "/runs/demo/policy", resolve(config, {"CPU": 6, "GPU": 0}))
    score = functools.partial(to_score, generation=config.generation, filters=config.filters)
    scorer = ScorerSettings(
        models={"initial": "a", "policy": "b"}, dtype="float32", batch_size=8, on_gpu=False, trust_remote_code=False
    )
    return {
        Sampler: (
            EngineUse(settings, 0.0),
            Sampling({DEFAULT_SAMPLING: config.generation.sampling}, trims=True),
            None,
            score,
        ),
        Embedder: (settings, True),
        Scorer: (scorer, None, 0.0),
    }


@pytest.mark.parametrize("config", [CONFIG, load_config(overrides=[LONG])], ids=["filters", "long exemplars"])
def test_actors_are_made_with_little_whatever_the_recipe_holds(config: Config) -> None:
    for actor, arguments in actor_arguments(config).items():
        assert len(cloudpickle.dumps((actor, arguments))) < INLINE_BYTES / 4, actor
    assert sum(len(one.question) for one in load_config(overrides=[LONG]).prompts.exemplars) > INLINE_BYTES
