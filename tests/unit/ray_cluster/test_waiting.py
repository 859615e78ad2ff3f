"""What is said while a stage waits for nodes, and when it gives up; on a clock of the test's own, without a cluster.

python -m pytest tests/unit/ray_cluster/test_waiting.py
"""

from __future__ import annotations

import threading
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.errors import UserError
from mipo_ray.ray_cluster import watch as cluster_waiting
from mipo_ray.ray_cluster.resources import Request
from mipo_ray.ray_cluster.waiting import INFEASIBLE_SECONDS, Autoscaling, NoAnswerError, Wait, WaitTimeoutError

STARTING = Autoscaling(starting={"gpu-spot": 2, "gpu": 1})
SILENCE = NoAnswerError("RPC error: Deadline Exceeded")


def engines(**changes: Any) -> Request:
    values: dict[str, Any] = {"phase": "generation", "kind": "engine", "key": "generation.pool.min_size"}
    values |= {"fewest": 4, "most": 8, "cpus": 2.0, "gpus": 1.0, "selector": {"mipo.io/role": "generate"}}
    return Request(**{**values, **changes})


def workers(**changes: Any) -> Request:
    return engines(phase="training", kind="worker", key="train.num_workers", selector={}, **changes)


def follow(wait: Wait, placed: int, autoscaling: Autoscaling | NoAnswerError | None, seconds: range) -> dict[int, str]:
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


def test_a_wait_of_hours_says_how_long_it_may_last() -> None:
    """As the cloud overlays set it: whoever reads the log knows that the run is well, and until when."""
    wait = Wait(engines(), limit_minutes=720)
    lines = follow(wait, 0, STARTING, range(0, 43200))
    assert ", 15 s of at most 12 hours; the autoscaler is starting" in lines[15]
    assert all(" of at most 12 hours; " in line for line in lines.values())
    assert max(later - earlier for earlier, later in pairwise(lines)) == 300
    assert " hours of at most " in list(lines.values())[-1]
    with pytest.raises(WaitTimeoutError, match=r"waited 12 hours \(ray\.wait_timeout_minutes 720\)"):
        wait.observe(0, STARTING, 43200)


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


def test_a_head_that_does_not_answer_is_waited_for_no_longer_than_nodes() -> None:
    wait = Wait(engines(), limit_minutes=1)
    follow(wait, 4, None, range(0, 100))
    lines = follow(wait, 0, SILENCE, range(100, 160))
    assert lines[115].endswith("; the cluster's head does not answer (RPC error: Deadline Exceeded)")
    with pytest.raises(WaitTimeoutError, match=r"wait_timeout_minutes 1\).*does not answer \(RPC error: Deadline Exc"):
        wait.observe(0, SILENCE, 160)


def test_a_head_that_answers_again_in_time_is_forgiven() -> None:
    wait = Wait(workers(), limit_minutes=1)
    follow(wait, 4, None, range(0, 100))
    follow(wait, 0, SILENCE, range(100, 150))
    assert follow(wait, 4, None, range(150, 151)) == {150: "4 training workers have their nodes, after 50 s"}
    follow(wait, 0, SILENCE, range(151, 210))


def test_the_autoscalers_verdict_does_not_last_through_silence() -> None:
    wait = Wait(workers(), limit_minutes=60)
    half = int(INFEASIBLE_SECONDS / 2)
    follow(wait, 0, Autoscaling(infeasible=True), range(0, half))
    follow(wait, 0, SILENCE, range(half, half + 1))
    follow(wait, 0, Autoscaling(infeasible=True), range(half + 1, 3 * half))


# The looks at the cluster, with a clock and a cluster of the test's own.


class FakeCluster:
    """Answers the watches' questions: `placed` actors, or an error; each question takes a second of its clock."""

    def __init__(self, patch: pytest.MonkeyPatch, *, placed: int = 0, error: Exception | None = None) -> None:
        self.placed, self.error, self.now = placed, error, 0.0
        patch.setattr(cluster_waiting, "placed_actors", self.placed_actors)
        patch.setattr(cluster_waiting, "autoscaling", self.autoscaling)
        patch.setattr(cluster_waiting, "time", SimpleNamespace(monotonic=lambda: self.now))

    def placed_actors(self, is_wanted: Any) -> int:
        self.now += 1
        if self.error is not None:
            raise self.error
        return self.placed

    def autoscaling(self, request: Request) -> Autoscaling:
        raise SILENCE


def look(wait: Wait, times: int) -> None:
    for _ in range(times):
        cluster_waiting._look(wait, lambda: cluster_waiting.placed_actors(bool))


def test_looks_that_fail_count_as_waiting(monkeypatch: pytest.MonkeyPatch) -> None:
    FakeCluster(monkeypatch, error=SILENCE)
    wait = Wait(engines(), limit_minutes=1)
    look(wait, times=60)
    with pytest.raises(WaitTimeoutError, match=r"for 4 engine actors.*; the cluster's head does not answer"):
        look(wait, times=1)


def test_engines_that_work_need_no_word_of_the_autoscaler(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    FakeCluster(monkeypatch, placed=1)
    wait = Wait(engines(), limit_minutes=1)
    look(wait, times=1000)
    assert "waiting for 3 more engine actors" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("error", "kind"), [(SILENCE, WaitTimeoutError), (AttributeError("not foreseen"), AttributeError)]
)
def test_the_watch_over_workers_ends_the_training_whatever_happens(
    error: Exception, kind: type[Exception], monkeypatch: pytest.MonkeyPatch
) -> None:
    FakeCluster(monkeypatch, error=error)
    monkeypatch.setattr(cluster_waiting, "LOOK_SECONDS", 0.001)
    ended = threading.Semaphore(0)
    with cluster_waiting.watch_workers(workers(), 1, ended.release) as watch:
        # A training that had not begun when it was to end is ended once it has.
        assert ended.acquire(timeout=60)
        assert ended.acquire(timeout=60)
    assert isinstance(watch.failure, kind)
