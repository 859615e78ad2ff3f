"""What a run does at once: rounds stream where engines and training workers have GPUs of their own at the same time,
and a policy is evaluated while the next round samples where engines and scorers have.

python -m pytest tests/unit/planning/test_schedule.py
"""

from __future__ import annotations

from dataclasses import replace

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.planning.lifetime import engine_lifetime
from mipo_ray.planning.schedule import evaluation_overlap, round_schedule
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


def overlap(nodes: list[Node], *overrides: str) -> str:
    config = load_config(None, overrides)
    resources = resolve(config, total(nodes))
    return str(evaluation_overlap(config, resources, nodes, engine_lifetime(config, resources, nodes)))


FOUR_OF_EIGHT = ("generation.pool.min_size=4", "generation.pool.max_size=4", "train.num_workers=4")
OVERLAPPING = "evaluate.schedule=overlapping"


def test_a_policy_is_evaluated_while_the_next_round_samples_where_a_scorer_has_a_gpu_of_its_own() -> None:
    """It is one of the training workers', which wait for the evaluation."""
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT) == "overlapping (engines and scorers fit at once)"
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, "evaluate.schedule=sequential") == "sequential (evaluate.schedule)"
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, OVERLAPPING) == "overlapping (evaluate.schedule)"
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, "evaluate.enabled=false") == "sequential (nothing is evaluated)"
    guarded = overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, "guard.when_bad=stop")
    assert guarded == "sequential (the guard decides before a round begins)"


def test_on_a_laptop_it_is_evaluated_first_unless_asked_otherwise() -> None:
    assert overlap([LAPTOP]) == "sequential (engines and scorers have no GPUs of their own)"
    assert overlap([LAPTOP], OVERLAPPING) == "overlapping (evaluate.schedule)"


def test_a_pool_that_may_grow_over_every_gpu_leaves_none_for_a_scorer() -> None:
    growing = ("generation.pool.min_size=4", "generation.pool.max_size=8", "train.num_workers=4")
    assert overlap([EIGHT_GPUS], *growing) == "sequential (no room for 8 engines and 1 scorers at once)"
    with pytest.raises(ResourceError, match=r"^evaluate.schedule=overlapping: no room for 8 engines and 1 scorers"):
        overlap([EIGHT_GPUS], *growing, OVERLAPPING)


def test_a_judges_own_engines_want_places_beside_the_policys() -> None:
    judge = ("evaluate.judge.model=org/judge", "evaluate.judge.protocols=[pointwise]")
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, *judge).startswith("overlapping")
    one_more = ("generation.pool.min_size=4", "generation.pool.max_size=5", "train.num_workers=4")
    assert overlap([EIGHT_GPUS], *one_more).startswith("overlapping")
    assert overlap([EIGHT_GPUS], *one_more, *judge) == "sequential (no room for 5 engines and 4 judges at once)"


def test_engines_that_end_with_their_stage_cannot_be_shared() -> None:
    stage = (*FOUR_OF_EIGHT, "generation.pool.lifetime=stage")
    assert overlap([EIGHT_GPUS], *stage) == "sequential (engines live for the stage (generation.pool.lifetime))"
    with pytest.raises(ResourceError, match=r"overlapping: engines live for the stage \(generation.pool.lifetime\);"):
        overlap([EIGHT_GPUS], *stage, OVERLAPPING)


def test_nodes_on_demand_overlap_only_when_asked_to() -> None:
    on_demand = ("ray.autoscaling=true", "generation.pool.lifetime=run")
    assert overlap([LAPTOP], *on_demand) == "sequential (nodes on demand)"
    assert overlap([LAPTOP], *on_demand, OVERLAPPING) == "overlapping (evaluate.schedule)"


def test_nothing_is_sampled_beside_the_evaluation_of_a_run_on_pairs_that_exist() -> None:
    own = ("pairs.path=a.jsonl", "rounds=1", "evaluate.prompts.path=b.jsonl", "conditioning.strategy=random_prompt")
    assert overlap([EIGHT_GPUS], *FOUR_OF_EIGHT, *own) == "sequential (the pairs exist)"
    with pytest.raises(UserError, match=r"evaluate\.schedule overlapping evaluates while pairs are sampled"):
        load_config(None, [*own, OVERLAPPING])
