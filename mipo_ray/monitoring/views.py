"""How a run is shown: lines in a log, JSON for machines, or nothing but errors; `live_view` is that of a terminal."""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, Literal, Protocol

from mipo_ray.monitoring.library_output import Streams
from mipo_ray.monitoring.run_lines import line, values
from mipo_ray.monitoring.run_state import Event, RunState, StageKey
from mipo_ray.terminal import plain

# auto: a live view on a terminal, else lines.
Display = Literal["auto", "quiet", "json"]

LINE_SECONDS = 15.0  # between two lines about a phase under way

# Events that say nothing to machines that `progress` and the stages' own do not say.
_COUNTS = ("phase_start", "phase_end", "ready", "answered", "scored", "assembled", "generated", "warning")


class View(Protocol):
    """Shows a run: what is said, and how it goes on."""

    refresh_seconds: float
    """Between two calls of `show`."""

    def say(self, text: str, is_error: bool) -> None:
        """Takes what `terminal.say` says, with its line end."""

    def watching(self) -> AbstractContextManager[None]:
        """For the time in which `show` is called."""

    def show(self, run: RunState, news: Sequence[Event], now: float) -> None:
        """Shows how the run stands after `news`, which `run` has taken."""


class Lines:
    """Lines in a log: what is said, and a line about each phase under way every LINE_SECONDS."""

    refresh_seconds = 1.0

    def __init__(self, streams: Streams) -> None:
        self._streams = streams
        self._since: dict[tuple[StageKey, str | None], float] = {}

    def say(self, text: str, is_error: bool) -> None:
        _write(self._streams.err if is_error else self._streams.out, text)

    @contextlib.contextmanager
    def watching(self) -> Iterator[None]:
        yield

    def show(self, run: RunState, news: Sequence[Event], now: float) -> None:
        due = {}
        for state in run.under_way.values():
            phase = state.phase
            key = (state.key, None if phase is None else phase.name)
            due[key] = self._since.get(key, state.since if phase is None else phase.started)
            if now - due[key] >= LINE_SECONDS:
                due[key] = now
                self._line(line(state, run, now), values(state, run, now))
        self._since = due

    def _line(self, text: str, found: dict[str, Any]) -> None:
        self.say(f"{plain(text)}\n", is_error=False)


class JsonLines(Lines):
    """One JSON object on each line of standard output: the events of `metrics.jsonl`, what is said as `message`, and
    `progress` of each phase under way. What is said of errors is also text on standard error."""

    def say(self, text: str, is_error: bool) -> None:
        said = {"event": "message", "time": time.time(), "error": is_error, "text": text.rstrip("\n")}
        if text.strip():
            self.tell(said)
        if is_error:
            _write(self._streams.err, text)

    def tell(self, event: Event) -> None:
        """Writes an object that is no text for people."""
        _write(self._streams.out, json.dumps(event) + "\n")

    def show(self, run: RunState, news: Sequence[Event], now: float) -> None:
        for event in news:
            if event["event"] not in _COUNTS:
                self.tell(event)
        super().show(run, news, now)

    def _line(self, text: str, found: dict[str, Any]) -> None:
        self.tell(found)


class Quiet(Lines):
    """Errors alone."""

    def say(self, text: str, is_error: bool) -> None:
        if is_error:
            _write(self._streams.err, text)


def _write(stream: Any, text: str) -> None:
    stream.write(text)
    stream.flush()
