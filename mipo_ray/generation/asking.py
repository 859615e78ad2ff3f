"""How a sampling actor asks its engine for the rows of several blocks, such that those are found that kill it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import Any, TypeVar

import pyarrow as pa

from mipo_ray.generation.bisection import Gate, Search
from mipo_ray.generation.deaths import Deaths, Group, group_of

Answers = TypeVar("Answers")


class Asker:
    """Asks one engine. With a record of deaths each group of rows is noted while the engine has it; one that was with
    an engine that died is asked alone, by halves, and a row of which engines die is set aside.

    probe: something that every engine answers. It is asked before rows are asked alone, so that an engine which is of
    no use whatever it is asked dies of that.
    """

    def __init__(self, deaths: Deaths | None, probe: Callable[[], Awaitable[Any]]):
        self._deaths = deaths
        self._probe = probe
        self._gate = Gate()

    async def answers(
        self, step: str, block: pa.Table, ask: Callable[[range], Awaitable[Answers]]
    ) -> list[tuple[range, Answers | None]]:
        """What `ask` gives for the rows of a block, group by group in order; None for a single row that is set aside.

        step: what is asked of them, by which the record tells it apart. Raises QuarantineError where too many rows are
        set aside, and whatever `ask` raises.
        """
        rows = range(block.num_rows)
        if self._deaths is None or not rows:
            return [(rows, await ask(rows))]
        deaths, prompt_ids = self._deaths, block["prompt_id"].to_pylist()

        def group(part: range) -> Group:
            return group_of(step, prompt_ids[part.start : part.stop])

        async def ask_noted(part: range) -> Answers:
            await deaths.ask(group(part))
            answers = await ask(part)
            await deaths.answer(group(part))
            return answers

        async def ask_alone(part: range) -> Answers:
            await self._probe()
            return await ask_noted(part)

        if not await deaths.had(group(rows)):
            async with self._gate.together():
                return [(rows, await ask_noted(rows))]
        search = Search(
            deaths=lambda part: deaths.alone(group(part)),
            ask=ask_alone,
            set_aside=lambda part: deaths.set_aside(group(part)),
        )
        async with self._gate.alone():
            return await search.answers(rows)
