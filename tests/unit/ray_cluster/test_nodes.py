"""What is asked of the cluster's head, by threads at once.

python -m pytest tests/unit/ray_cluster/test_nodes.py
"""

from __future__ import annotations

import asyncio
import threading
import weakref
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.ray_cluster import nodes


class HeadThatForgets:
    """As Ray's client of the head: a call whose client is gone before the answer came is never answered."""

    async def _answer(self, alive: weakref.ref[HeadThatForgets]) -> dict[str, Any]:
        await asyncio.sleep(0.05)
        while alive() is None:
            await asyncio.sleep(1)
        actor = SimpleNamespace(class_name="Sampler", state=1, ALIVE=1, PENDING_CREATION=0)
        return {"one": SimpleNamespace(**vars(actor), address=SimpleNamespace(ip_address="127.0.0.1"))}

    def async_get_all_actor_info(self, **_: Any) -> Any:
        return HeadThatForgets._answer(None, weakref.ref(self))  # type: ignore[arg-type]  # must not hold it


def test_a_client_that_nobody_keeps_is_held_until_it_has_answered(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two threads that ask for the first time at once make two clients, of which one is kept. Without a hand on the
    other one its call has no end: a run stood still so, in the first seconds of two Ray Data executions."""
    monkeypatch.setattr(nodes, "_head", HeadThatForgets)
    context = SimpleNamespace(get_job_id=lambda: "01000000")
    monkeypatch.setattr(nodes.ray, "get_runtime_context", lambda: context)

    found: list[int] = []
    asking = threading.Thread(target=lambda: found.append(nodes.placed_actors("Sampler".__eq__)), daemon=True)
    asking.start()
    asking.join(2)
    assert found == [1]
