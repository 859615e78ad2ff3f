"""How long reserved GPUs had no work."""

from __future__ import annotations

import time
from collections.abc import Callable


class IdleClock:
    """GPU seconds without work in one process that reserves `gpus` GPUs, from its making on.

    Work may overlap; the clock stands still while there is any. Loading a model is no work. What comes after the last
    work is not seen, as nothing reports it any more.
    """

    def __init__(self, gpus: float, now: Callable[[], float] = time.monotonic):
        self._gpus = gpus
        self._now = now
        self._working = 0
        self._idle_since = now()
        self._idle_seconds = 0.0

    def work_begins(self) -> None:
        """One more piece of work is under way."""
        if not self._working:
            self._idle_seconds += self._now() - self._idle_since
        self._working += 1

    def work_ends(self) -> None:
        """One piece of work is done."""
        self._working -= 1
        if not self._working:
            self._idle_since = self._now()

    def work_was(self, seconds: float) -> None:
        """A piece of work that took so long has just ended."""
        now = self._now()
        self._idle_seconds += max(0.0, now - self._idle_since - seconds)
        self._idle_since = now

    def take(self) -> dict[str, float]:
        """{"idle_gpu_seconds": since the last call}, to be put into an event; nothing where no GPU is reserved.

        An idle time that still lasts counts with the next work.
        """
        idle, self._idle_seconds = self._idle_seconds, 0.0
        return {"idle_gpu_seconds": self._gpus * idle} if self._gpus else {}
