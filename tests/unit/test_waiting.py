"""What is said while a stage waits for nodes, and when it gives up; on a clock of the test's own.

python -m pytest tests/unit/test_waiting.py
"""

from __future__ import annotations

from typing import Any

import pytest

from mipo_ray.errors import UserError
from mipo_ray.resources import Request
from mipo_ray.waiting import INFEASIBLE_SECONDS, Autoscaling, Wait, WaitTimeoutError

STARTING = Autoscaling(starting={"gpu-spot": 2, "gpu": 1})


def engines(**changes: Any) -> Request:
    values: dict[str, Any] = {"phase": "generation", "kind": "engine", "key": "generation.pool.min_size"}
    values |= {"fewest": 4, "most": 8, "cpus": 2.0, "gpus": 1.0, "selector": {"mipo.io/role": "generate"}}
    return Request(**{**values, **changes})


def workers(**changes: Any) -> Request:
    return engines(phase="training", kind="worker", key="train.num_workers", selector={}, **changes)


def follow(wait: Wait, placed: int, autoscaling: Autoscaling | None, seconds: range) -> dict[int, str]:
    """The lines of these seconds, by second."""
    lines = {second: wait.observe(placed, autoscaling, second) for second in seconds}
    return {second: line for second, line in lines.items() if line is not None}


def test_a_wait_is_told_ever_more_rarely_and_its_end_once() -> None:
    wait = Wait(engines(), limit_minutes=30)
    lines = follow(wait, 1, STARTING, range(0, 1200))
    assert list(lines) == [15, 45, 105, 225, 465, 765, 1065]
    assert lines[15] == (
        "waiting for 3 more engine actors, each on a node with 2 CPUs, 1 GPUs and labels mipo.io/role=generate, 15 s; "
        "the autoscaler is starting 1 gpu, 2 gpu-spot"
    )
    assert ", 8 minutes; " in lines[465]
    assert follow(wait, 4, None, range(1200, 1300)) == {1200: "4 engine actors have their nodes, after 20 minutes"}


def test_actors_that_get_their_nodes_at_once_are_not_spoken_of() -> None:
    wait = Wait(workers(), limit_minutes=30)
    assert follow(wait, 0, None, range(0, 14)) == {}
    assert follow(wait, 4, None, range(14, 500)) == {}


def test_engines_are_waited_for_without_end_while_one_works() -> None:
    wait = Wait(engines(), limit_minutes=1)
    assert follow(wait, 1, Autoscaling(infeasible=True), range(0, 7200))
    # It is lost: from then on the time counts.
    follow(wait, 0, None, range(7200, 7260))
    with pytest.raises(
        WaitTimeoutError, match=r"^generation: waited 60 s \(ray\.wait_timeout_minutes 1\) for 4 engine"
    ):
        wait.observe(0, None, 7260)


def test_training_waits_for_all_its_workers() -> None:
    wait = Wait(workers(), limit_minutes=1)
    follow(wait, 3, None, range(0, 60))
    with pytest.raises(UserError) as caught:
        wait.observe(3, None, 60)
    assert str(caught.value) == (
        "training: waited 60 s (ray.wait_timeout_minutes 1) for 1 more training workers, each on a node with 2 CPUs, 1 "
        "GPUs; no autoscaler of this cluster says what it does. Expected nodes that hold them: check train.num_workers"
        ", what each one reserves, its label_selector, and the cluster's node groups and their maximum sizes"
    )


def test_a_restarted_training_waits_anew() -> None:
    wait = Wait(workers(), limit_minutes=1)
    follow(wait, 0, None, range(0, 50))
    follow(wait, 4, None, range(50, 100))
    follow(wait, 3, None, range(100, 160))
    with pytest.raises(WaitTimeoutError, match="waited 60 s"):
        wait.observe(3, None, 160)


def test_what_the_autoscaler_calls_infeasible_ends_sooner_if_it_stays_so() -> None:
    wait = Wait(workers(), limit_minutes=60)
    half = int(INFEASIBLE_SECONDS / 2)
    lines = follow(wait, 0, Autoscaling(infeasible=True), range(0, half))
    assert lines[15].endswith("; the autoscaler has no node type that fits, or may add none")
    follow(wait, 0, STARTING, range(half, half + 10))  # nodes that were about to go made place
    again = half + 10
    follow(wait, 0, Autoscaling(infeasible=True), range(again, again + 2 * half))
    with pytest.raises(WaitTimeoutError, match=r"waited 8 minutes for 4 training workers.*no node type that fits"):
        wait.observe(0, Autoscaling(infeasible=True), again + 2 * half)


@pytest.mark.parametrize(
    ("autoscaling", "said"),
    [
        (Autoscaling(), "the autoscaler is starting nothing"),
        (
            Autoscaling(failed=("gpu: quota", "gpu: no capacity")),
            "the autoscaler is starting nothing (it failed to: gpu: no capacity)",
        ),
        (
            Autoscaling(starting={"gpu": 1}, failed=("spot: no capacity",), infeasible=True),
            "the autoscaler is starting 1 gpu (it failed to: spot: no capacity)",
        ),
    ],
)
def test_what_is_said_of_the_autoscaler(autoscaling: Autoscaling, said: str) -> None:
    assert str(autoscaling) == said
