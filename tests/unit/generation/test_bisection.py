"""Rows that kill engines are found by halves, all others are answered, and few engines die for it. No Ray, no vLLM.

python -m pytest tests/unit/generation/test_bisection.py
"""

from __future__ import annotations

import asyncio
import math
from collections import Counter
from collections.abc import Callable

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.generation.bisection import DEATHS_OF_A_ROW, Gate, Search


class EngineDied(Exception):
    """Takes the process that asks with it."""


class Searched:
    """The search over rows 0 to n - 1, begun again after every death; `kills` says of which rows together an engine
    dies, and may count how often it was asked."""

    def __init__(self, rows: int, kills: Callable[[range], bool]) -> None:
        self.died: Counter[tuple[int, ...]] = Counter()
        self.aside: list[int] = []
        self.parts: list[tuple[range, list[int] | None]] = []
        while True:
            self.asked: list[range] = []
            self.aside = []
            try:
                self.parts = asyncio.run(self._search(kills).answers(range(rows)))
                return
            except EngineDied:
                assert self.died.total() <= 1000

    def _search(self, kills: Callable[[range], bool]) -> Search[list[int]]:
        async def deaths(rows: range) -> int:
            return self.died[tuple(rows)]

        async def ask(rows: range) -> list[int]:
            self.asked.append(rows)
            if kills(rows):
                self.died[tuple(rows)] += 1
                raise EngineDied
            return [10 * row for row in rows]

        async def set_aside(rows: range) -> None:
            (row,) = rows
            self.aside.append(row)

        return Search(deaths, ask, set_aside)

    @property
    def answers(self) -> dict[int, int]:
        """Row -> its answer; fails where a row is there twice."""
        pairs = [pair for rows, part in self.parts if part is not None for pair in zip(rows, part, strict=True)]
        assert len(dict(pairs)) == len(pairs)
        return dict(pairs)


@st.composite
def rows_and_deadly(draw: st.DrawFn) -> tuple[int, set[int]]:
    rows = draw(st.integers(1, 100))
    return rows, draw(st.sets(st.integers(0, rows - 1)))


@given(rows_and_deadly())
def test_any_deadly_rows_are_found_and_every_other_row_is_answered_once(case: tuple[int, set[int]]) -> None:
    rows, deadly = case
    searched = Searched(rows, lambda part: not deadly.isdisjoint(part))
    assert searched.aside == sorted(deadly)
    assert searched.answers == {row: 10 * row for row in range(rows) if row not in deadly}
    assert [row for part, _ in searched.parts for row in part] == list(range(rows))
    # In each of the ceil(log2(rows)) sizes of groups above one row at most one that holds a given row is asked.
    assert searched.died.total() <= len(deadly) * (math.ceil(math.log2(rows)) + DEATHS_OF_A_ROW)


@pytest.mark.parametrize(("deadly", "deaths"), [(0, 7), (31, 3)])
def test_what_is_left_of_a_deadly_group_is_halved_without_another_death(deadly: int, deaths: int) -> None:
    """32 rows, 16, 8, 4, 2 and twice 1 where the first row is deadly; 32 and twice 1 where the last is."""
    assert Searched(32, lambda rows: deadly in rows).died.total() == deaths


@given(st.integers(2, 40), st.data())
def test_rows_of_which_an_engine_dies_together_alone_are_all_answered(rows: int, data: st.DataObject) -> None:
    one = data.draw(st.integers(0, rows - 2))
    other = data.draw(st.integers(one + 1, rows - 1))
    searched = Searched(rows, lambda part: one in part and other in part)
    assert searched.aside == []
    assert searched.answers == {row: 10 * row for row in range(rows)}


@given(st.integers(1, 40), st.integers(1, 12))
def test_deaths_by_chance_set_no_row_aside_that_is_answered_afterwards(rows: int, chance: int) -> None:
    """Every `chance`-th time an engine dies of whatever it has, but not of the same single row twice."""
    calls = 0
    singles: set[int] = set()

    def kills(part: range) -> bool:
        nonlocal calls
        calls += 1
        dies = calls % (chance + 1) == 0 and not (len(part) == 1 and part.start in singles)
        if dies and len(part) == 1:
            singles.add(part.start)
        return dies

    searched = Searched(rows, kills)
    assert searched.aside == []
    assert searched.answers == {row: 10 * row for row in range(rows)}


def test_who_is_alone_waits_for_those_inside_and_goes_before_those_who_come() -> None:
    gate, order = Gate(), []
    inside: set[str] = set()

    async def together(name: str) -> None:
        async with gate.together():
            order.append(name)
            inside.add(name)
            assert "alone" not in inside
            await asyncio.sleep(0.01)
            inside.remove(name)

    async def alone() -> None:
        async with gate.alone():
            order.append("alone")
            assert not inside
            inside.add("alone")
            await asyncio.sleep(0.01)
            inside.remove("alone")

    async def run() -> None:
        first = [asyncio.ensure_future(together(name)) for name in "ab"]
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        await asyncio.wait_for(asyncio.gather(*first, alone(), alone(), together("c"), together("d")), 5)

    asyncio.run(run())
    assert order == ["a", "b", "alone", "alone", "c", "d"]


def test_one_who_gives_up_waiting_to_be_alone_keeps_nobody_out() -> None:
    async def run() -> None:
        gate = Gate()

        async def alone() -> None:
            async with gate.alone():
                pass

        async with gate.together():
            waiting = asyncio.ensure_future(alone())
            await asyncio.sleep(0)
            waiting.cancel()
            await asyncio.gather(waiting, return_exceptions=True)
            async with asyncio.timeout(1), gate.together():
                pass

    asyncio.run(run())
