"""What a stage tells while it works, for whoever watches: its phases, and what has been finished since."""

from __future__ import annotations

import contextlib
import time
from collections import Counter
from collections.abc import Iterator

from mipo_ray.monitoring.events import Events

# Between two counts that an actor tells.
TELL_SECONDS = 1.0


@contextlib.contextmanager
def progress(events: Events, phase: str, unit: str, total: int | None = None) -> Iterator[None]:
    """While the block runs, the stage of `events` is in a phase of that name, which will finish `total` of `unit`
    ("rows", "responses", "steps"); None: the events of the phase say how many."""
    told = {"phase": phase, "unit": unit, **({} if total is None else {"total": total})}
    events.tell({"event": "phase_start", **told})
    try:
        yield
    finally:
        events.tell({"event": "phase_end", "phase": phase})


class Tally:
    """Counts what an actor finishes and tells it once a second, so that one sees it move between two blocks."""

    def __init__(self, events: Events) -> None:
        self._events = events
        self._counts: Counter[str] = Counter()
        self._told = 0.0

    def answered(self, answers: int, tokens: int) -> None:
        """A row has all of its `answers`, which have so many tokens."""
        self._counts.update(rows=1, answers=answers, tokens=tokens)
        if time.monotonic() - self._told >= TELL_SECONDS:
            self.tell()

    def tell(self) -> None:
        """Tells what was counted since it was last told."""
        self._told = time.monotonic()
        if self._counts:
            self._events.tell({"event": "answered", **self._counts})
            self._counts.clear()
