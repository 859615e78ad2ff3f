"""Whose each living actor is: the board of clients, for executions that share the actors.

python -m pytest tests/unit/ray_cluster/test_living.py
"""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.ray_cluster.living import _Board

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
