"""An engine without vLLM that has a fault: it dies of some rows, with everything that it has."""

from __future__ import annotations

import asyncio
from collections.abc import Collection


class EngineDied(Exception):
    """What everything gets that was with an engine that died."""


class FaultyEngine:
    """Answers rows by their names in two turns of the event loop, and dies of some of them, with all that it has."""

    def __init__(self, deadly: Collection[str]) -> None:
        self._deadly = deadly
        self._is_dead = False
        self.most_together = 0
        self._together = 0

    async def answer(self, names: list[str]) -> list[str]:
        self._together += 1
        self.most_together = max(self.most_together, self._together)
        try:
            for _ in range(2):
                await asyncio.sleep(0)
                self._is_dead = self._is_dead or not set(names).isdisjoint(self._deadly)
                if self._is_dead:
                    raise EngineDied
            return [f"answer to {name}" for name in names]
        finally:
            self._together -= 1
