"""How long engines live: as long as the run where all fits at once, wherever Ray puts it.

python -m pytest tests/unit/planning/test_lifetime.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.recipe import load_config
from mipo_ray.planning.lifetime import Lifetime, engine_lifetime
from mipo_ray.ray_cluster.resources import Node, ResourceError, resolve, total

GIB = 1024**3
LAPTOP = Node({"CPU": 6.0, "memory": 14.0 * GIB})
EIGHT_GPUS = Node({"CPU": 64.0, "GPU": 8.0, "memory": 400.0 * GIB})


def lifetime(nodes: list[Node], *overrides: str, engines_alone: bool = False) -> Lifetime:
    config = load_config(None, overrides)
    return engine_lifetime(config, resolve(config, total(nodes)), nodes, engines_alone=engines_alone)


def test_on_a_laptop_engines_live_as_long_as_the_run() -> None:
    assert str(lifetime([LAPTOP])) == "run (all fits at once)"
    assert (lifetime([LAPTOP]).living, lifetime([LAPTOP], "generation.pool.lifetime=stage").living) == (1, 0)


def test_on_a_laptop_with_little_memory_they_do_not() -> None:
    small = Node({"CPU": 6.0, "memory": 4.0 * GIB})
    found = lifetime([small])
    assert not found.is_run
    assert "GiB at once, the nodes have 4.0" in found.why


def test_on_a_laptop_a_scorer_stays_too_where_it_has_the_memory() -> None:
    roomy = Node({"CPU": 6.0, "memory": 16.0 * GIB})
    assert lifetime([roomy]).keeps_scorers
    assert not lifetime([roomy], "evaluate.enabled=false").keeps_scorers
    assert not lifetime([roomy], "generation.pool.lifetime=stage").keeps_scorers
    assert not lifetime([roomy], engines_alone=True).keeps_scorers
    sizes = [Node({"CPU": 6.0, "memory": quarters * GIB / 4}) for quarters in range(4, 66)]
    found = [(lifetime([size]).is_run, lifetime([size]).keeps_scorers) for size in sizes]
    assert set(found) == {(False, False), (True, False), (True, True)}
    assert found == sorted(found)


def test_no_gpu_stands_idle_for_a_scorer() -> None:
    found = lifetime([EIGHT_GPUS], "train.num_workers=2")
    assert (found.is_run, found.keeps_scorers) == (True, False)


def test_on_a_laptop_a_judges_engines_take_the_place_of_the_policys() -> None:
    judge = ["evaluate.judge.model=org/judge", "evaluate.judge.protocols=[pointwise]"]
    assert "a judge's own engines share the memory" in lifetime([LAPTOP], *judge).why
    assert "a judge's own engines share the memory" in lifetime([LAPTOP], *judge, engines_alone=True).why


@pytest.mark.parametrize(("engines", "workers", "is_run"), [(4, 4, True), (5, 4, False), (8, 8, False), (1, 7, True)])
def test_one_node_of_gpus_holds_both_or_one_after_the_other(engines: int, workers: int, is_run: bool) -> None:
    pool = [f"generation.pool.min_size={engines}", f"generation.pool.max_size={engines}"]
    assert lifetime([EIGHT_GPUS], *pool, f"train.num_workers={workers}").is_run == is_run


def test_groups_of_their_own_never_stand_in_each_others_way() -> None:
    generate = replace(EIGHT_GPUS, labels={"role": "generate"})
    training = replace(EIGHT_GPUS, labels={"role": "train"})
    overrides = ["generation.pool.min_size=8", "generation.pool.max_size=16", "train.num_workers=8"]
    labels = ["generation.pool.label_selector={role: generate}", "train.label_selector={role: train}"]
    found = lifetime([generate, training], *overrides, *labels, "evaluate.enabled=false")
    assert found.is_run
    assert found.most == 8  # more would wait for nodes that do not come
    # Scorers take places where engines are, of which none is left.
    assert not lifetime([generate, training], *overrides, *labels).is_run


def test_what_is_asked_for_is_done_or_refused() -> None:
    pool = ["generation.pool.min_size=8", "generation.pool.max_size=8", "train.num_workers=8"]
    assert not lifetime([LAPTOP], "generation.pool.lifetime=stage").is_run
    with pytest.raises(ResourceError, match="lifetime=run: no room for 8 engines and 8 workers at once"):
        lifetime([EIGHT_GPUS], *pool, "generation.pool.lifetime=run")


def test_nodes_that_come_on_demand_go_again_unless_asked_otherwise() -> None:
    assert str(lifetime([LAPTOP], "ray.autoscaling=true")) == "stage (nodes on demand)"
    assert lifetime([LAPTOP], "ray.autoscaling=true", "generation.pool.lifetime=run").is_run


def test_a_command_that_only_samples_has_nothing_beside_its_engines() -> None:
    pool = ["generation.pool.min_size=8", "generation.pool.max_size=8", "train.num_workers=8"]
    assert lifetime([EIGHT_GPUS], *pool, engines_alone=True).is_run


@given(
    st.lists(st.integers(0, 8), min_size=1, max_size=6),
    st.integers(1, 12),
    st.integers(1, 12),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.sampled_from([1.0, 2.0, 4.0]),
    st.randoms(use_true_random=False),
)
def test_where_it_says_that_all_fits_it_does_wherever_the_engines_go(
    gpus, engines, workers, engine_gpus, worker_gpus, random
) -> None:
    nodes = [Node({"CPU": 100.0, "GPU": float(count)}) for count in gpus]
    if not sum(gpus):
        return
    found = lifetime(
        nodes,
        f"generation.pool.min_size={engines}",
        f"generation.pool.max_size={engines}",
        f"generation.pool.gpus_per_engine={engine_gpus}",
        f"train.num_workers={workers}",
        f"train.gpus_per_worker={worker_gpus}",
        "evaluate.enabled=false",
    )
    if not found.is_run:
        return
    left = [float(count) for count in gpus]
    for _ in range(engines):  # Ray may take any node that has room
        roomy = [place for place, free in enumerate(left) if free >= engine_gpus]
        if not roomy:
            return  # refused before this: the engines alone have no room
        left[random.choice(roomy)] -= engine_gpus
    assert sum(int(free // worker_gpus) for free in left) >= workers


def test_a_run_that_samples_nothing_has_no_engine() -> None:
    own = ("pairs.path=a.jsonl", "rounds=1", "evaluate.enabled=false")
    assert lifetime([LAPTOP], *own).living == 0
    assert lifetime([LAPTOP], *own, engines_alone=True).living == 1
