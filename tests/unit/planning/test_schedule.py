"""Whether rounds stream: where engines and training workers have GPUs of their own at the same time.

python -m pytest tests/unit/planning/test_schedule.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.planning.lifetime import engine_lifetime
from mipo_ray.planning.schedule import round_schedule
from mipo_ray.ray_cluster.resources import Node, ResourceError, resolve, total

LAPTOP = Node({"CPU": 6.0, "memory": 14.0 * 1024**3})
EIGHT_GPUS = Node({"CPU": 64.0, "GPU": 8.0, "memory": 400.0 * 1024**3})
FOUR_AND_FOUR = (
    "generation.pool.min_size=4",
    "generation.pool.max_size=4",
    "train.num_workers=4",
    "evaluate.enabled=false",
)


def schedule(nodes: list[Node], *overrides: str, rows: int = 10_000) -> str:
    config = load_config(None, overrides)
    resources = resolve(config, total(nodes))
    engines = engine_lifetime(config, resources, nodes).most
    return str(round_schedule(config, resources, nodes, rows, engines))


def test_rounds_stream_where_both_sides_have_gpus_at_once() -> None:
    assert schedule([EIGHT_GPUS], *FOUR_AND_FOUR) == "streaming (engines and workers fit at once)"
    assert schedule([EIGHT_GPUS], *FOUR_AND_FOUR, "schedule=sequential") == "sequential (schedule)"


def test_on_a_laptop_both_sides_share_the_cores() -> None:
    assert schedule([LAPTOP]) == "sequential (engines and workers have no GPUs of their own)"
    assert schedule([LAPTOP], "schedule=streaming") == "streaming (schedule)"


def test_half_a_gpu_each_may_be_the_same_gpu() -> None:
    halves = ["generation.pool.gpus_per_engine=0.5", "train.gpus_per_worker=0.5"]
    assert "no GPUs of their own" in schedule([EIGHT_GPUS], *FOUR_AND_FOUR, *halves)


def test_a_pool_that_may_grow_over_the_workers_gpus_runs_before_them() -> None:
    pool = ["generation.pool.min_size=1", "generation.pool.max_size=8", "train.num_workers=4", "evaluate.enabled=false"]
    assert schedule([EIGHT_GPUS], *pool) == "sequential (no room for 8 engines and 4 workers at once)"
    with pytest.raises(
        ResourceError, match=r"^schedule=streaming: no room for 8 engines and 4 workers at once; set it"
    ):
        schedule([EIGHT_GPUS], *pool, "schedule=streaming")


def test_nodes_of_their_own_bound_how_far_the_pool_grows() -> None:
    nodes = [replace(EIGHT_GPUS, labels={"role": role}) for role in ("generate", "train")]
    labels = ["generation.pool.label_selector={role: generate}", "train.label_selector={role: train}"]
    pool = ["generation.pool.min_size=8", "generation.pool.max_size=16", "train.num_workers=8"]
    assert schedule(nodes, *labels, *pool, "evaluate.enabled=false").startswith("streaming")


def test_what_is_sampled_all_at_once_has_nothing_to_stream() -> None:
    """4 engines work on 4 blocks each, and 512 prompts are 16 blocks of 32: the first is done when the last is."""
    assert schedule([EIGHT_GPUS], *FOUR_AND_FOUR, rows=512) == "sequential (4 engines sample all 16 blocks at once)"
    assert schedule([EIGHT_GPUS], *FOUR_AND_FOUR, rows=544).startswith("streaming")


def test_cached_log_probs_need_all_pairs_first() -> None:
    cached = "train.reference_mode=cached"
    assert "takes all pairs before the first step" in schedule([EIGHT_GPUS], *FOUR_AND_FOUR, cached)
    with pytest.raises(UserError, match="schedule streaming trains before all pairs are there"):
        load_config(None, [cached, "schedule=streaming"])


def test_nodes_on_demand_stream_only_when_asked_to() -> None:
    assert schedule([LAPTOP], "ray.autoscaling=true") == "sequential (nodes on demand)"
    assert schedule([LAPTOP], "ray.autoscaling=true", "schedule=streaming") == "streaming (schedule)"


def test_pairs_that_exist_are_all_there() -> None:
    own = ("pairs.path=a.jsonl", "rounds=1")
    assert schedule([EIGHT_GPUS], *FOUR_AND_FOUR, *own) == "sequential (the pairs exist)"
