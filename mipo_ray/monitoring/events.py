"""The one place that emits metrics: metrics.jsonl in the run directory, Ray metrics, and the optional trackers.

An event is a flat dict: `time` (seconds since the epoch), `round` (null for the base), `stage`, `event` (its kind), and
numbers by name. `metrics` says which of them are Ray metrics, and under which names Prometheus sees them.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mipo_ray.monitoring.event_lines import parse_events
from mipo_ray.monitoring.metrics import METRICS
from mipo_ray.monitoring.ray_metrics import RayMetrics, number
from mipo_ray.monitoring.trackers import Trackers, tracker_environment
from mipo_ray.storage.faults import named
from mipo_ray.storage.local_files import append_whole
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.terminal import say_error

FLUSH_SECONDS = 5.0
# How long the end of a run waits for the last numbers to reach Ray's endpoint.
LAST_EXPORT_SECONDS = 10.0
# That nobody has asked for yet.
MOST_NEWS = 10_000

COUNTED = {(metric.event, metric.key) for metric in METRICS if metric.kind == "counter"}


class EventWriter:
    """Writes events to metrics.jsonl, Ray's metrics and the trackers. One per run, as the actor that `start` makes."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._sums: dict[tuple[int | None, str], dict[str, float]] = {}
        self._news: deque[dict[str, Any]] = deque(maxlen=MOST_NEWS)
        self._pending: list[str] = []
        self._flushed = time.monotonic()
        # An object store cannot append: there the whole object is written anew at each flush.
        before = run.read_text("metrics.jsonl") or ""
        self._stored = "" if run.is_local else before
        if before and not before.endswith("\n"):  # a kill cut the last line off; the next event gets a line of its own
            self._pending.append("")
        self._metrics = RayMetrics(run.url)
        self._metrics.keep_repeating()
        self._trackers = Trackers(self._warn)
        for event in parse_events(before):
            self._metrics.restore(event)
            self._trackers.count(event)

    def open_trackers(self, names: Sequence[str], environment: dict[str, str]) -> None:
        """Starts the trackers; raises UserError for one that cannot be started. Returns when they take events."""
        self._trackers.open(names, self._run, environment)

    def emit(self, event: dict[str, Any]) -> None:
        """Records one event; it is on storage within a few seconds, or at the next `flush`."""
        event = {"time": time.time(), **event}
        kind = str(event.get("event"))
        sums = self._sums_of(event.get("round"), str(event.get("stage")))
        self._news.append(event)
        self._pending.append(json.dumps(event))
        for name, value in event.items():
            if (kind, name) in COUNTED and number(value):
                sums[name] = sums.get(name, 0) + value
        self._metrics.record(event)
        self._trackers.log(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def tell(self, event: dict[str, Any]) -> None:
        """Takes an event that is only for whoever watches: it is written nowhere."""
        self._news.append({"time": time.time(), **event})

    def news(self) -> list[dict[str, Any]]:
        """What was emitted and told since the last call, in order; of very many the newest."""
        news = list(self._news)
        self._news.clear()
        return news

    def total(self, round_index: int | None, stage: str, name: str) -> float:
        """The sum of a key that `metrics` has as a counter over a stage's events, since the writer started."""
        return self._sums_of(round_index, stage).get(name, 0)

    def _sums_of(self, round_index: int | None, stage: str) -> dict[str, float]:
        return self._sums.setdefault((round_index, stage), {})

    def _warn(self, text: str) -> None:
        say_error(text)
        self.tell({"event": "warning", "text": text})

    def flush(self) -> None:
        """Brings every event to storage."""
        self._flushed = time.monotonic()
        self._trackers.flush()
        if not self._pending:
            return
        lines = "".join(line + "\n" for line in self._pending)
        if self._run.is_local:
            with named(self._run.path("metrics.jsonl"), "written"):
                append_whole(self._run.path("metrics.jsonl"), lines)
        else:
            self._run.write_text("metrics.jsonl", self._stored + lines)
            self._stored += lines
        self._pending.clear()  # only now: a write that failed is tried again with the next events

    def close(self, succeeded: bool) -> None:
        """Brings everything to storage and ends the trackers' runs, as finished or as failed."""
        self.flush()
        self._trackers.close(succeeded)


@dataclass(frozen=True)
class Events:
    """Sends the events of one stage to the writer; travels to actors and workers."""

    writer: Any
    round: Round = BASE
    stage: str = "run"

    def emit(self, event: dict[str, Any]) -> None:
        """Records an event without waiting for it."""
        self.writer.emit.remote({"round": self.round.index, "stage": self.stage, **event})

    def tell(self, event: dict[str, Any]) -> None:
        """Tells whoever watches, without waiting; nothing is recorded (see `EventWriter.tell`)."""
        self.writer.tell.remote({"round": self.round.index, "stage": self.stage, **event})

    def total(self, name: str) -> float:
        """The sum of an event's counted key (see `EventWriter.total`) over this stage, since the run started."""
        total: float = ray.get(self.writer.total.remote(self.round.index, self.stage, name))
        return total

    def at(self, round: Round, stage: str) -> Events:
        """The same writer for another stage."""
        return Events(self.writer, round, stage)

    def emit_and_wait(self, event: dict[str, Any]) -> None:
        """Records an event; returns when the writer has it. For a process that is about to end."""
        ray.get(self.writer.emit.remote({"round": self.round.index, "stage": self.stage, **event}))

    def flush(self) -> None:
        """Waits until everything sent from this process is on storage."""
        ray.get(self.writer.flush.remote())


# For work that sends no event, or none any more: no writer and no tracker is there to hear one.
NO_EVENTS = Events(None)


def start(run: RunDirectory, trackers: Sequence[str] = ()) -> Events:
    """Starts the writer as an actor on the driver's node (where a local run directory is).

    Raises UserError when one of the trackers cannot be started.
    """
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(EventWriter).options(num_cpus=0, scheduling_strategy=strategy, name=None)
    writer: Any = actor.remote(run)
    if trackers:
        ray.get(writer.open_trackers.remote(tuple(trackers), tracker_environment()))
    return Events(writer)


@contextlib.contextmanager
def recording(run: RunDirectory, trackers: Sequence[str] = ()) -> Iterator[Events]:
    """The writer for the time of a run: everything is on storage, and the trackers' runs are ended, when it ends."""
    events = start(run, trackers)
    succeeded = False
    try:
        yield events
        succeeded = True
    finally:
        # A cluster that went away must not hide why.
        with contextlib.suppress(ray.exceptions.RayError):
            ray.get(events.writer.close.remote(succeeded))
            # Only a process that ends by itself exports its last numbers first; ray.shutdown would kill it.
            ray.get(events.writer.__ray_terminate__.remote(), timeout=LAST_EXPORT_SECONDS)


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """Every event of metrics.jsonl; a last line that a kill cut off is left out."""
    return parse_events(run.read_text("metrics.jsonl") or "")
