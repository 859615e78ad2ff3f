"""The one place that emits metrics: metrics.jsonl in the run directory, Ray metrics, and the optional trackers.

An event is a flat dict: `time` (seconds since the epoch), `round` (null for the base), `stage`, `event` (its kind), and
numbers by name. `metrics` says which of them are Ray metrics, and under which names Prometheus sees them.
"""

from __future__ import annotations

import contextlib
import json
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import ray

from mipo_ray.monitoring.event_lines import parse_events
from mipo_ray.monitoring.metrics import METRICS
from mipo_ray.monitoring.ray_metrics import RayMetrics, number
from mipo_ray.monitoring.trackers import Trackers, tracker_environment
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory

FLUSH_SECONDS = 5.0
# How long the end of a run waits for the last numbers to reach Ray's endpoint.
LAST_EXPORT_SECONDS = 10.0

COUNTED = {(metric.event, metric.key) for metric in METRICS if metric.kind == "counter"}


class EventWriter:
    """Writes events to metrics.jsonl, Ray's metrics and the trackers. One per run, as the actor that `start` makes."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._stages: dict[tuple[int | None, str], dict[str, dict[str, Any]]] = {}
        self._pending: list[str] = []
        self._flushed = time.monotonic()
        # An object store cannot append: there the whole object is written anew at each flush.
        before = run.read_text("metrics.jsonl") or ""
        self._stored = "" if run.is_local else before
        if before and not before.endswith("\n"):  # a kill cut the last line off; the next event gets a line of its own
            self._pending.append("")
        self._metrics = RayMetrics(run.url)
        self._metrics.keep_repeating()
        self._trackers = Trackers()
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
        state = self.state(event.get("round"), str(event.get("stage")))
        state["latest"][kind] = event
        self._pending.append(json.dumps(event))
        for name, value in event.items():
            if (kind, name) in COUNTED and number(value):
                state["sums"][name] = state["sums"].get(name, 0) + value
        self._metrics.record(event)
        self._trackers.log(event)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def state(self, round_index: int | None, stage: str) -> dict[str, dict[str, Any]]:
        """What a stage reported since the writer started: `latest` event by kind, and `sums` of what is counted.

        `sums` are by key of the event, for those that `metrics` has as counters.
        """
        return self._stages.setdefault((round_index, stage), {"latest": {}, "sums": {}})

    def flush(self) -> None:
        """Brings every event to storage."""
        self._flushed = time.monotonic()
        self._trackers.flush()
        if not self._pending:
            return
        lines = "".join(line + "\n" for line in self._pending)
        if self._run.is_local:
            os.makedirs(self._run.root, exist_ok=True)
            with open(self._run.path("metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(lines)
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

    def total(self, name: str) -> float:
        """The sum of an event's counted key (see `EventWriter.state`) over this stage, since the run started."""
        return ray.get(self.writer.state.remote(self.round.index, self.stage))["sums"].get(name, 0)

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
