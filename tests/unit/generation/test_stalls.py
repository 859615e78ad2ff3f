"""An engine that does nothing any more is not waited for, one that is busy with others is. No vLLM.

python -m pytest tests/unit/generation/test_stalls.py
"""

from __future__ import annotations

import asyncio
from typing import Any

import pytest

from mipo_ray.generation.engine import Engine
from mipo_ray.generation.vllm_arguments import EngineStalled


def engine(stall_seconds: float | None) -> Engine:
    """An engine without vLLM, of which only the clock of its steps is looked at."""
    made = Engine.__new__(Engine)
    made._stall_seconds = stall_seconds
    made._stepped()
    return made


async def answer_after(seconds: float) -> list[Any]:
    await asyncio.sleep(seconds)
    return ["answer"]


def test_an_engine_that_does_no_step_is_given_up() -> None:
    with pytest.raises(EngineStalled, match=r"did no step for 0.00\d* minutes \(generation.stall_minutes 0.0016"):
        asyncio.run(engine(0.1)._unless_stalled(answer_after(60)))


def test_an_answer_may_take_long_while_the_engine_works() -> None:
    working = engine(0.2)

    async def ask() -> list[Any]:
        answer = asyncio.ensure_future(working._unless_stalled(answer_after(0.6)))
        while not answer.done():
            working._stepped()
            await asyncio.sleep(0.02)
        return await answer

    assert asyncio.run(ask()) == ["answer"]


@pytest.mark.parametrize("stall_seconds", [None, 30.0])
def test_an_answer_in_time_is_the_answer(stall_seconds: float | None) -> None:
    assert asyncio.run(engine(stall_seconds)._unless_stalled(answer_after(0.01))) == ["answer"]


def test_an_error_of_the_engine_is_the_error() -> None:
    async def fail() -> list[Any]:
        raise KeyError("of the engine")

    with pytest.raises(KeyError, match="of the engine"):
        asyncio.run(engine(30.0)._unless_stalled(fail()))


def test_an_idle_engine_is_not_taken_for_a_stalled_one() -> None:
    idle = engine(0.2)
    idle._last_step -= 3600
    assert asyncio.run(idle._unless_stalled(answer_after(0.05))) == ["answer"]
