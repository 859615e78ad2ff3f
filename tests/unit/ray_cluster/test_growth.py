"""What Ray Data's executions may ask of a cluster that adds nodes.

python -m pytest tests/unit/ray_cluster/test_growth.py
"""

from __future__ import annotations

import math

import pytest
from ray.data import ExecutionOptions

from mipo_ray.config.recipe import load_config
from mipo_ray.ray_cluster.growth import allow_gpus, keep_to_group
from mipo_ray.ray_cluster.resources import Request

GROUPS = ("generation.pool.label_selector={role: generate}", "train.label_selector={role: train}")


@pytest.mark.parametrize(("training", "selector"), [(False, {"role": "!train"}), (True, {"role": "!generate"})])
def test_reading_stays_off_the_other_phases_nodes_and_asks_for_no_gpus(
    training: bool, selector: dict[str, str]
) -> None:
    options = ExecutionOptions(preserve_order=True)
    keep_to_group(options, load_config(None, [*GROUPS, "ray.autoscaling=true"]), training=training)
    assert options.label_selector == selector
    assert (options.resource_limits.cpu, options.resource_limits.gpu) == (math.inf, 0)
    assert options.preserve_order


def test_one_group_for_both_phases_keeps_nothing_off() -> None:
    options = ExecutionOptions()
    one = [f"{key}={{role: train}}" for key in ("generation.pool.label_selector", "train.label_selector")]
    keep_to_group(options, load_config(None, [*one, "ray.autoscaling=true"]), training=True)
    assert options.label_selector is None


def test_nothing_is_changed_where_the_cluster_does_not_grow() -> None:
    options = ExecutionOptions()
    keep_to_group(options, load_config(None, list(GROUPS)), training=True)
    assert options == ExecutionOptions()


def test_the_actors_of_an_execution_may_have_their_gpus() -> None:
    options, free = ExecutionOptions(), ExecutionOptions()
    keep_to_group(options, load_config(None, ["ray.autoscaling=true"]), training=False)
    for most in (4, 2):  # an embedder and engines in one execution
        allow_gpus(options, Request("generation", "engine", "generation.pool.min_size", 1, most, 1.0, 0.5, {}))
    assert options.resource_limits.gpu == 3
    allow_gpus(free, Request("generation", "engine", "generation.pool.min_size", 1, 4, 1.0, 1.0, {}))
    assert free == ExecutionOptions()
