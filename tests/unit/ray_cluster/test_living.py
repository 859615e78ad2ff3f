"""Whose each living actor is: the board of clients, for executions that share the actors.

python -m pytest tests/unit/ray_cluster/test_living.py
"""

from __future__ import annotations

import pickle
import time
from concurrent.futures import ThreadPoolExecutor
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.ray_cluster import living
from mipo_ray.ray_cluster.living import LivingActors, _Board
from mipo_ray.ray_cluster.resources import Request

ACTORS = 3
# An execution, one of its clients, and whether it takes or gives back.
CALLS = st.lists(st.tuples(st.integers(1, 3), st.sampled_from("abcde"), st.booleans()), max_size=60)


def test_a_client_has_an_actor_of_its_own_until_it_gives_it_back() -> None:
    board = _Board(2)
    assert [board.take(1, client) for client in "abc"] == [0, 1, None]
    assert board.take(1, "b") == 1
    board.give_back(1, "a")
    assert board.take(1, "c") == 0


def test_two_executions_share_the_actors_and_a_late_client_of_the_first_one_finds_its_place() -> None:
    board = _Board(2)
    assert board.take(1, "first") == 0
    assert [board.take(2, client) for client in ("second", "third")] == [0, 1]
    assert board.take(1, "late") == 1
    board.give_back(1, "first")
    assert board.take(2, "fourth") is None


@given(CALLS)
def test_an_execution_finds_what_it_would_find_alone(calls) -> None:
    together, alone = _Board(ACTORS), {use: _Board(ACTORS) for use in (1, 2, 3)}
    held: dict[tuple[int, str], int] = {}
    for use, client, takes in calls:
        if not takes:
            together.give_back(use, client)
            alone[use].give_back(use, client)
            held.pop((use, client), None)
            continue
        number = together.take(use, client)
        assert number == alone[use].take(use, client)
        if number is not None:
            others = [place for (other, name), place in held.items() if other == use and name != client]
            assert number in range(ACTORS)
            assert number not in others
            held[use, client] = number


def test_they_travel_in_a_session() -> None:
    """Training workers get it whole."""
    request = Request("generate", "engine", "generation.pool", fewest=2, most=2, cpus=1.0, gpus=0.0, selector={})
    assert pickle.loads(pickle.dumps(LivingActors(SimpleNamespace, (), request))).request == request


def test_threads_that_ask_at_once_get_leases_of_the_same_actors(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second set would reserve what the first one has, and wait for it without end."""
    started: list[str] = []

    def slow_remote(actor_class: type) -> Any:
        def remote(*_: Any) -> str:
            time.sleep(0.02)
            started.append(actor_class.__name__)
            return f"{actor_class.__name__} {len(started)}"

        return SimpleNamespace(options=lambda **_: SimpleNamespace(remote=remote))

    monkeypatch.setattr(living.ray, "remote", slow_remote)
    monkeypatch.setattr(living.ray, "get_runtime_context", lambda: SimpleNamespace(get_node_id=lambda: "0" * 56))
    request = Request("generate", "engine", "generation.pool", fewest=2, most=2, cpus=1.0, gpus=0.0, selector={})
    actors = LivingActors(SimpleNamespace, (), request)
    with ThreadPoolExecutor(4) as threads:
        leases = list(threads.map(lambda _: actors.lease(), range(4)))
    assert sorted(started) == ["SimpleNamespace", "SimpleNamespace", "_Board"]
    assert len({(lease.board, lease.actors) for lease in leases}) == 1
    assert len(leases[0].actors) == 2
    assert sorted(lease.use for lease in leases) == [1, 2, 3, 4]
