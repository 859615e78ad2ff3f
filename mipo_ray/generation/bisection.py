"""Which rows of a block kill engines, found by halves. Plain asyncio: no Ray, no vLLM.

An engine works on rows of several blocks at the same time, and nothing says which of them it died of. So the rows that
were with it are asked again alone, block by block; those that kill an engine alone are halved, and each half is asked
alone, down to single rows.

The process that asks does not survive its engine's death. What outlives it is a count of how often rows that were asked
alone took an engine with them, by which the same search begins again and comes to the place where it was.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Generic, TypeVar

# Of how many deaths, one after the other and of each of them alone, a row is set aside. One may be chance: a node that
# was taken away, another process that needed the memory.
DEATHS_OF_A_ROW = 2

Answers = TypeVar("Answers")


@dataclass(frozen=True)
class Search(Generic[Answers]):
    """What a search among the rows of one block does with a group of them."""

    deaths: Callable[[range], Awaitable[int]]
    """How often these rows alone took an engine with them."""
    ask: Callable[[range], Awaitable[Answers]]
    """Their answers, by an engine that has nothing else to do; it does not return where the engine dies."""
    set_aside: Callable[[range], Awaitable[None]]
    """Takes note that a single row is not to be asked again."""

    async def answers(self, rows: range, *, must_hold_one: bool = False) -> list[tuple[range, Answers | None]]:
        """The answers to `rows`, group by group in order; None for a single row that is set aside.

        must_hold_one: they are what is left of a group that killed an engine while its first half was answered, so that
        asking them as they are would cost one more. One row among n that kills every engine takes at most
        ceil(log2(n)) + DEATHS_OF_A_ROW of them.
        """
        if len(rows) == 1:
            if await self.deaths(rows) < DEATHS_OF_A_ROW:
                return [(rows, await self.ask(rows))]
            await self.set_aside(rows)
            return [(rows, None)]
        if not must_hold_one and not await self.deaths(rows):
            return [(rows, await self.ask(rows))]
        middle = len(rows) // 2
        first = await self.answers(rows[:middle])
        is_whole = len(first) == 1 and first[0][1] is not None
        return first + await self.answers(rows[middle:], must_hold_one=is_whole)


class Gate:
    """Who may ask an engine: many at the same time, or one alone, who goes before all that have not begun."""

    def __init__(self) -> None:
        self._inside = 0
        self._want_it_alone = 0
        self._changed = asyncio.Condition()

    @asynccontextmanager
    async def together(self) -> AsyncIterator[None]:
        """Waits until nobody wants the engine alone."""
        async with self._inside_when(lambda: not self._want_it_alone):
            yield

    @asynccontextmanager
    async def alone(self) -> AsyncIterator[None]:
        """Waits until nobody is inside."""
        self._want_it_alone += 1
        try:
            async with self._inside_when(lambda: not self._inside):
                yield
        finally:
            self._want_it_alone -= 1
            async with self._changed:
                self._changed.notify_all()

    @asynccontextmanager
    async def _inside_when(self, may_enter: Callable[[], bool]) -> AsyncIterator[None]:
        async with self._changed:
            await self._changed.wait_for(may_enter)
            self._inside += 1
        try:
            yield
        finally:
            self._inside -= 1
            async with self._changed:
                self._changed.notify_all()
