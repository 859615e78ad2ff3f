"""What a run asks of a cluster.

python -m pytest tests/unit/ray_cluster/test_resources.py
"""

from __future__ import annotations

import os
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.recipe import load_config
from mipo_ray.ray_cluster.resources import (
    Node,
    Request,
    ResourceError,
    Resources,
    check_resources,
    judge_resources,
    local_cpus,
    phases,
    requests,
    resolve,
    total,
)

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


def test_the_judges_own_engines_are_placed_as_those_of_generation() -> None:
    overrides = ["generation.pool.max_size=4", "generation.pool.tensor_parallel_size=2", "model.dtype=float32"]
    config = load_config(overrides=[*overrides, "evaluate.judge.model=org/judge"])
    resources = resolve(config, GPUS)
    judges = requests(config, resources)[-1]
    assert (judges.kind, judges.phase, judges.fewest, judges.most, judges.gpus) == ("judge", "judging", 1, 4, 2.0)
    assert judge_resources(config, resources) == Resources(True, "bfloat16", 2.0, 1.0)
    larger = load_config(
        overrides=[*overrides, "evaluate.judge.model=org/judge", "evaluate.judge.tensor_parallel_size=16"]
    )
    assert judge_resources(larger, resolve(larger, CPU_ONLY)) == Resources(False, "float32", 0.0, 0.0)
    with pytest.raises(ResourceError, match="judging needs 16 GPUs and the cluster has 8"):
        check_resources(larger, resolve(larger, GPUS), GPUS)
    served = load_config(overrides=["evaluate.judge.model=m", "evaluate.judge.endpoint=http://localhost:8000/v1"])
    assert "judging" not in phases(served, resolve(served, GPUS))


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
    nodes = [Node({"CPU": 2.0, "GPU": 1.0}), Node({"CPU": 2.0, "GPU": 1.0})]
    resources = resolve(config, total(nodes))
    assert phases(config, resources)["training"] == {"CPU": 3.0, "GPU": 2.0}
    check_resources(config, resources, total(nodes), nodes)
    with pytest.raises(ResourceError, match=r"^training needs 3 CPUs and the cluster has 2: lower train\.min_workers"):
        check_resources(config, resources, total(nodes[:1]), nodes[:1])
    uneven = [
        Node({"CPU": 4.0, "GPU": 1.0}),
        Node({"CPU": 0.0, "GPU": 1.0}),
    ]  # the GPU of the second node has no CPU beside it
    with pytest.raises(ResourceError, match=r"room for 1 of the 2 that train\.min_workers asks for"):
        check_resources(config, resources, total(uneven), uneven)
    fixed = load_config(overrides=overrides)
    with pytest.raises(ResourceError, match=r"^training needs 9 CPUs and the cluster has 4: lower train\.num_workers"):
        check_resources(fixed, resources, total(nodes), nodes)


@pytest.mark.parametrize("autoscaling", ["true", "false"])
def test_attention_that_cannot_train_on_cpus_needs_gpus_for_training(autoscaling: str) -> None:
    overrides = ["train.attention=flex_attention", "train.layout=packed", f"ray.autoscaling={autoscaling}"]
    config = load_config(overrides=overrides)
    check_resources(config, resolve(config, GPUS), GPUS)
    with pytest.raises(ResourceError, match=r"^train\.attention: flex_attention trains on GPUs only"):
        check_resources(config, resolve(config, CPU_ONLY), CPU_ONLY)
    engines_only = load_config(overrides=[*overrides, "train.gpus_per_worker=0"])
    with pytest.raises(ResourceError, match=r"^train\.attention: flex_attention trains on GPUs only"):
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
    halves = [Node({"CPU": 16.0, "GPU": 4.0}), Node({"CPU": 16.0, "GPU": 4.0})]
    assert total(halves) == {"CPU": 32.0, "GPU": 8.0}
    with pytest.raises(ResourceError, match=r"room for 0 of the 1 that generation\.pool\.min_size asks for"):
        check_resources(config, resolve(config, total(halves)), total(halves), halves)
    whole = [Node({"CPU": 16.0, "GPU": 8.0})]
    check_resources(config, resolve(config, total(whole)), total(whole), whole)


# Labels and strategies.

GROUPS = [
    Node({"CPU": 1.0}, {"mipo.io/role": "head"}),
    Node({"CPU": 4.0}, {"mipo.io/role": "generate"}),
    Node({"CPU": 4.0}, {"mipo.io/role": "train"}),
    Node({"CPU": 2.0}, {"mipo.io/role": "train"}),
]
ON_GROUPS = ["generation.pool.label_selector={mipo.io/role: generate}", "train.label_selector={mipo.io/role: train}"]


def request(**changes: Any) -> Request:
    values: dict[str, Any] = {"fewest": 1, "most": 1, "cpus": 2.0, "gpus": 0.0, "selector": {}, **changes}
    return Request(phase="training", kind="worker", key="train.num_workers", **values)


def test_the_requests_of_a_run() -> None:
    overrides = [*ON_GROUPS, "train.placement_strategy=SPREAD", "train.min_workers=1", "train.num_workers=3"]
    overrides += ["generation.pool.max_size=4", "evaluate.scorers=2", "train.cpus_per_worker=2"]
    config = load_config(overrides=overrides)
    engines, workers, scorers = requests(config, resolve(config, GPUS))
    generate, train = {"mipo.io/role": "generate"}, {"mipo.io/role": "train"}
    assert engines == Request("generation", "engine", "generation.pool.min_size", 1, 4, 1.0, 1.0, generate)
    assert workers == Request("training", "worker", "train.min_workers", 1, 3, 2.0, 1.0, train, "SPREAD")
    # The evaluation's actors run where the engines do.
    assert scorers == Request("evaluation", "scorer", "evaluate.scorers", 1, 2, 1.0, 1.0, generate)
    without = load_config(overrides=["evaluate.enabled=false"])
    assert [asked.phase for asked in requests(without, resolve(without, GPUS))] == ["generation", "training"]


def test_a_run_that_samples_nothing_asks_for_no_engine() -> None:
    config = load_config(overrides=["pairs.path=a.jsonl", "rounds=1", "evaluate.enabled=false"])
    assert [asked.phase for asked in requests(config, resolve(config, GPUS))] == ["training"]
    # A command that measures its policy later starts them all the same.
    few = {"CPU": 1.0, "GPU": 0.0}
    with pytest.raises(ResourceError, match=r"^generation needs 2 CPUs"):
        check_resources(config, resolve(config, few), few, engines_alone=True)


@pytest.mark.parametrize(
    ("changes", "room"),
    [
        ({}, 5),
        ({"selector": {"mipo.io/role": "train"}}, 3),
        ({"selector": {"mipo.io/role": "!train"}}, 2),
        ({"selector": {"mipo.io/role": "in(train, generate)"}, "cpus": 4.0}, 2),
        ({"selector": {"mipo.io/role": "nowhere"}}, 0),
        ({"selector": {"mipo.io/role": "train"}, "strategy": "SPREAD"}, 3),
        ({"selector": {"mipo.io/role": "train"}, "strategy": "STRICT_PACK"}, 2),
        ({"selector": {"mipo.io/role": "train"}, "strategy": "STRICT_SPREAD"}, 2),
        ({"selector": {"mipo.io/role": "train"}, "strategy": "STRICT_SPREAD", "cpus": 3.0}, 1),
        ({"gpus": 1.0}, 0),
    ],
)
def test_room_is_what_matching_nodes_hold(changes: dict[str, Any], room: int) -> None:
    assert request(**changes).room(GROUPS) == room


@given(
    st.lists(st.tuples(st.integers(0, 8), st.sampled_from(["a", "b"])), max_size=5),
    st.integers(1, 4),
    st.sampled_from(["a", "b", "!a", "in(a, b)"]),
)
def test_a_strict_strategy_never_has_more_room(nodes: list[tuple[int, str]], cpus: int, condition: str) -> None:
    cluster = [Node({"CPU": float(size)}, {"zone": zone}) for size, zone in nodes]
    loose, packed, apart = (
        request(cpus=float(cpus), selector={"zone": condition}, strategy=strategy).room(cluster)
        for strategy in ("PACK", "STRICT_PACK", "STRICT_SPREAD")
    )
    assert max(packed, apart) <= loose <= packed * apart if loose else packed == apart == 0
    # A node more never takes room away, and one that does not match gives none.
    more = [*cluster, Node({"CPU": 8.0}, {"zone": "c"})]
    grown = request(cpus=float(cpus), selector={"zone": condition}).room(more)
    assert grown == loose + (8 // cpus if condition == "!a" else 0)


def test_each_phase_must_fit_on_the_nodes_that_its_labels_name() -> None:
    def check(*overrides: str) -> None:
        config = load_config(overrides=[*ON_GROUPS, *overrides])
        check_resources(config, resolve(config, total(GROUPS)), total(GROUPS), GROUPS)

    check("generation.pool.min_size=4", "generation.pool.max_size=9", "train.num_workers=6")
    with pytest.raises(ResourceError) as caught:
        check("generation.pool.min_size=5", "generation.pool.max_size=9")
    assert str(caught.value) == (
        "generation: the 1 of 4 nodes that match the labels mipo.io/role=generate have room for 4 of the 5 that "
        "generation.pool.min_size asks for, with 1 CPUs and 0 GPUs on one node each"
    )
    with pytest.raises(ResourceError, match=r"^training: the 2 of 4 nodes .*role=train have room for 6 of the 7"):
        check("train.num_workers=7")
    with pytest.raises(ResourceError, match=r"room for 2 of the 3 .* on one node each and strategy STRICT_SPREAD$"):
        check("train.num_workers=3", "train.placement_strategy=STRICT_SPREAD")
    with pytest.raises(ResourceError, match=r"the 0 of 4 nodes that match the labels mipo\.io/role=nowhere have room"):
        check("train.label_selector={mipo.io/role: nowhere}")


def test_a_command_of_engines_alone_asks_for_no_worker_and_no_scorer() -> None:
    cluster = {"CPU": 4.0, "GPU": 1.0}

    def check(*overrides: str) -> None:
        config = load_config(overrides=list(overrides))
        check_resources(config, resolve(config, cluster), cluster, engines_alone=True)

    check("train.num_workers=99", "evaluate.scorers=99", "train.attention=flex_attention")
    with pytest.raises(ResourceError, match=r"^generation needs 6 CPUs and the cluster has 4"):
        check("generation.pool.min_size=5", "generation.pool.max_size=5")
    with pytest.raises(ResourceError, match=r"^judging needs 2 GPUs and the cluster has 1"):
        check("evaluate.judge.model=org/judge", "evaluate.judge.tensor_parallel_size=2")
