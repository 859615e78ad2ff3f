"""A sampling actor whose engine cannot be started for a reason that the user can mend says that reason, as what it is.

Of an error in an actor's constructor Ray keeps the text alone, so that the command would end as if it had failed.

python -m pytest tests/unit/generation/test_sampler_refusal.py
"""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import Any

import pyarrow as pa
import pytest

from mipo_ray.errors import UserError
from mipo_ray.generation import sampler
from mipo_ray.generation.actor_engines import EngineUse
from mipo_ray.generation.engine import REQUESTS
from mipo_ray.generation.sampler import Sampler

BLOCK = pa.table({"requests": pa.array([[]], REQUESTS)})


def first_block(error: Exception, monkeypatch: pytest.MonkeyPatch) -> None:
    """Makes the actor, whose engine raises `error` as it starts, and sends it a block."""

    def broken(*_: Any) -> None:
        raise error

    monkeypatch.setattr(sampler, "OwnEngine", broken)
    events: Any = SimpleNamespace(total=lambda name: 0)
    settings: Any = SimpleNamespace(max_model_len=16)
    actor = Sampler(EngineUse(settings, gpus=1.0), {}, events)

    async def send() -> None:
        async for _ in actor(BLOCK):
            pass

    asyncio.run(send())


def test_what_the_user_can_mend_reaches_the_driver_with_the_first_block(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"^Tesla T4: it has no bfloat16$"):
        first_block(UserError("Tesla T4: it has no bfloat16"), monkeypatch)


def test_anything_else_ends_the_actor_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sampler] = []
    monkeypatch.setattr(Sampler, "__call__", lambda actor, block: made.append(actor))
    with pytest.raises(RuntimeError, match="out of memory"):
        first_block(RuntimeError("CUDA out of memory"), monkeypatch)
    assert made == []
