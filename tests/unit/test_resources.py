"""What a run asks of a cluster.

python -m pytest tests/unit/test_resources.py
"""

from __future__ import annotations

import os

import pytest

from mipo_ray.recipe import load_config
from mipo_ray.resources import ResourceError, Resources, check_resources, local_cpus, phases, resolve, total

CPU_ONLY = {"CPU": 6.0}
GPUS = {"CPU": 64.0, "GPU": 8.0}


@pytest.mark.parametrize(
    ("overrides", "cluster", "expected"),
    [
        ([], CPU_ONLY, Resources(False, "float32", 0, 0)),
        ([], {"CPU": 6.0, "GPU": 0.0}, Resources(False, "float32", 0, 0)),
        ([], GPUS, Resources(True, "bfloat16", 1, 1)),
        (["generation.pool.tensor_parallel_size=4"], GPUS, Resources(True, "bfloat16", 4, 1)),
        (["generation.pool.tensor_parallel_size=4"], CPU_ONLY, Resources(False, "float32", 0, 0)),
        (["generation.pool.gpus_per_engine=0.5"], GPUS, Resources(True, "bfloat16", 0.5, 1)),
        (["generation.pool.gpus_per_engine=0", "train.gpus_per_worker=0"], GPUS, Resources(False, "float32", 0, 0)),
        (["model.dtype=float32"], GPUS, Resources(True, "float32", 1, 1)),
        (["model.dtype=bfloat16"], CPU_ONLY, Resources(False, "bfloat16", 0, 0)),
        # A cluster that starts without GPUs and adds them when asked.
        (["train.gpus_per_worker=1"], CPU_ONLY, Resources(True, "bfloat16", 1, 1)),
    ],
)
def test_what_is_left_open_follows_the_cluster(
    overrides: list[str], cluster: dict[str, float], expected: Resources
) -> None:
    assert resolve(load_config(overrides=overrides), cluster) == expected


def test_each_phase_leaves_a_cpu_for_read_and_write_tasks() -> None:
    config = load_config(
        overrides=[
            "generation.pool.min_size=2",
            "generation.pool.max_size=5",
            "generation.pool.cpus_per_engine=3",
            "generation.pool.tensor_parallel_size=2",
            "train.num_workers=4",
            "train.cpus_per_worker=2",
        ]
    )
    assert phases(config, resolve(config, GPUS)) == {
        "generation": {"CPU": 2 * 3 + 1, "GPU": 2 * 2},
        "training": {"CPU": 4 * 2 + 1, "GPU": 4},
    }


@pytest.mark.parametrize(
    ("overrides", "cluster", "message"),
    [
        (["train.num_workers=4"], {"CPU": 4.0}, "training needs 5 CPUs and the cluster has 4: lower train.num_workers"),
        (
            ["generation.pool.min_size=6", "generation.pool.max_size=6"],
            CPU_ONLY,
            "generation needs 7 CPUs and the cluster has 6: lower generation.pool.min_size",
        ),
        (["generation.pool.tensor_parallel_size=9"], GPUS, "generation needs 9 GPUs and the cluster has 8"),
        (["train.gpus_per_worker=1"], CPU_ONLY, "generation needs 1 GPUs and the cluster has 0"),
    ],
)
def test_more_than_the_cluster_has_is_refused(overrides: list[str], cluster: dict[str, float], message: str) -> None:
    config = load_config(overrides=overrides)
    with pytest.raises(ResourceError) as caught:
        check_resources(config, resolve(config, cluster), cluster)
    assert str(caught.value).startswith(message)
    growing = load_config(overrides=[*overrides, "ray.autoscaling=true"])
    check_resources(growing, resolve(growing, cluster), cluster)


def test_training_that_may_start_small_asks_for_its_fewest_workers_only() -> None:
    overrides = ["train.num_workers=8", "train.gpus_per_worker=1", "generation.pool.gpus_per_engine=1"]
    config = load_config(overrides=[*overrides, "train.min_workers=2"])
    nodes = [{"CPU": 2.0, "GPU": 1.0}, {"CPU": 2.0, "GPU": 1.0}]
    resources = resolve(config, total(nodes))
    assert phases(config, resources)["training"] == {"CPU": 3.0, "GPU": 2.0}
    check_resources(config, resources, total(nodes), nodes)
    with pytest.raises(ResourceError, match=r"^training needs 3 CPUs and the cluster has 2: lower train\.min_workers"):
        check_resources(config, resources, total(nodes[:1]), nodes[:1])
    uneven = [{"CPU": 4.0, "GPU": 1.0}, {"CPU": 0.0, "GPU": 1.0}]  # the GPU of the second node has no CPU beside it
    with pytest.raises(ResourceError, match=r"room for 1 of the 2 that train\.min_workers asks for"):
        check_resources(config, resources, total(uneven), uneven)
    fixed = load_config(overrides=overrides)
    with pytest.raises(ResourceError, match=r"^training needs 9 CPUs and the cluster has 4: lower train\.num_workers"):
        check_resources(fixed, resources, total(nodes), nodes)


@pytest.mark.parametrize("autoscaling", ["true", "false"])
@pytest.mark.parametrize("attention", ["flex_attention", "flash_attention_2"])
def test_attention_that_cannot_train_on_cpus_needs_gpus_for_training(attention: str, autoscaling: str) -> None:
    overrides = [f"train.attention={attention}", "train.layout=packed", f"ray.autoscaling={autoscaling}"]
    config = load_config(overrides=overrides)
    check_resources(config, resolve(config, GPUS), GPUS)
    with pytest.raises(ResourceError, match=rf"^train\.attention: {attention} trains on GPUs only"):
        check_resources(config, resolve(config, CPU_ONLY), CPU_ONLY)
    engines_only = load_config(overrides=[*overrides, "train.gpus_per_worker=0"])
    with pytest.raises(ResourceError, match=rf"^train\.attention: {attention} trains on GPUs only"):
        check_resources(engines_only, resolve(engines_only, GPUS), GPUS)


def test_exactly_what_the_cluster_has_is_enough() -> None:
    config = load_config(overrides=["train.num_workers=4", "generation.pool.max_size=100"])
    cluster = {"CPU": 5.0}
    check_resources(config, resolve(config, cluster), cluster)


def test_a_local_cluster_has_room_for_an_engine_and_the_tasks_beside_it() -> None:
    assert local_cpus(load_config()) == max(6, os.cpu_count() or 1)
    assert local_cpus(load_config(overrides=["ray.num_cpus=2"])) == 2


def test_an_engine_must_fit_on_one_node():
    config = load_config(None, ["generation.pool.tensor_parallel_size=8"])
    halves = [{"CPU": 16.0, "GPU": 4.0}, {"CPU": 16.0, "GPU": 4.0}]
    assert total(halves) == {"CPU": 32.0, "GPU": 8.0}
    with pytest.raises(ResourceError, match=r"room for 0 of the 1 that generation\.pool\.min_size asks for"):
        check_resources(config, resolve(config, total(halves)), total(halves), halves)
    whole = [{"CPU": 16.0, "GPU": 8.0}]
    check_resources(config, resolve(config, total(whole)), total(whole), whole)
