"""The one place that emits metrics: metrics.jsonl in the run directory, and Ray metrics with the same names.

An event is a flat dict: `time` (seconds since the epoch), `round` (null for the base), `stage`, `event`, and numbers by
name. Every number is also a Ray gauge `mipo_<name>` with the tags run, round and stage, and what COUNTERS lists is a
counter `mipo_<name>_sum` as well (Ray's endpoint puts `ray_` before each).
"""

from __future__ import annotations

import contextlib
import json
import os
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from mipo_ray.storage import RunDirectory

COUNTERS = ("rows", "generated_tokens", "scored_responses", "pairs", "engine_deaths")
FLUSH_SECONDS = 5.0
TAGS = ("run", "round", "stage")


class EventWriter:
    """Appends events to metrics.jsonl and to Ray's metrics. One per run, as the Ray actor that `start` makes."""

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
        self._gauges: dict[str, Gauge] = {}
        self._counters = {
            name: Counter(f"mipo_{name}_sum", description=f"sum of {name}", tag_keys=TAGS) for name in COUNTERS
        }

    def emit(self, event: dict[str, Any]) -> None:
        """Records one event; it is on storage within a few seconds, or at the next `flush`."""
        event = {"time": time.time(), **event}
        state = self.state(event.get("round"), str(event.get("stage")))
        state["latest"][str(event.get("event"))] = event
        self._pending.append(json.dumps(event))
        tags = {"run": self._run.url, "round": str(event.get("round")), "stage": str(event.get("stage"))}
        for name, value in event.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or name in ("time", "round"):
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"mipo_{name}", description=name.replace("_", " "), tag_keys=TAGS)
            self._gauges[name].set(float(value), tags=tags)
            if name in self._counters and event.get("event") != "pairs" and value > 0:
                state["sums"][name] = state["sums"].get(name, 0) + value
                self._counters[name].inc(float(value), tags=tags)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def state(self, round_index: int | None, stage: str) -> dict[str, dict[str, Any]]:
        """What a stage reported since the writer started: `latest` event by kind, and the `sums` of COUNTERS."""
        return self._stages.setdefault((round_index, stage), {"latest": {}, "sums": {}})

    def flush(self) -> None:
        """Brings every event to storage."""
        self._flushed = time.monotonic()
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


@dataclass(frozen=True)
class Events:
    """Sends the events of one stage to the writer; travels to actors and workers."""

    writer: Any
    round_index: int | None = None
    stage: str = "run"

    def emit(self, event: dict[str, Any]) -> None:
        """Records an event without waiting for it."""
        self.writer.emit.remote({"round": self.round_index, "stage": self.stage, **event})

    def total(self, name: str) -> float:
        """The sum of one of COUNTERS over this stage, since the run started."""
        return ray.get(self.writer.state.remote(self.round_index, self.stage))["sums"].get(name, 0)

    def at(self, round_index: int | None, stage: str) -> Events:
        """The same writer for another stage."""
        return Events(self.writer, round_index, stage)

    def emit_and_wait(self, event: dict[str, Any]) -> None:
        """Records an event; returns when the writer has it. For a process that is about to end."""
        ray.get(self.writer.emit.remote({"round": self.round_index, "stage": self.stage, **event}))

    def flush(self) -> None:
        """Waits until everything sent from this process is on storage."""
        ray.get(self.writer.flush.remote())


def start(run: RunDirectory) -> Events:
    """Starts the writer as an actor on the driver's node (where a local run directory is)."""
    strategy = ray.util.scheduling_strategies.NodeAffinitySchedulingStrategy(
        ray.get_runtime_context().get_node_id(), soft=False
    )
    actor = ray.remote(EventWriter).options(num_cpus=0, scheduling_strategy=strategy, name=None)
    return Events(actor.remote(run))


@contextlib.contextmanager
def progress(events: Events, event: str, count: str, description: str, total: int | None = None) -> Iterator[None]:
    """A progress bar on the driver over one stage, fed by its events of one kind.

    `count` names the field to follow: one of COUNTERS is summed up; `step` is taken as it is, with the event's
    `total_steps` and, where the objective has them, its loss, reward margin and reward accuracy beside the bar.
    """
    from tqdm import tqdm

    stop = threading.Event()
    interval = 1.0 if sys.stderr.isatty() else 15.0  # seconds between two lines in a log file

    def follow() -> None:
        with tqdm(desc=description, total=total, unit=count.removesuffix("s"), mininterval=interval) as bar:
            finished = False
            while not finished:
                finished = stop.wait(1.0)
                state = ray.get(events.writer.state.remote(events.round_index, events.stage))
                newest = state["latest"].get(event, {})
                if "total_steps" in newest:
                    bar.total = newest["total_steps"]
                    names = [name for name in ("loss", "reward_margin", "reward_accuracy") if name in newest]
                    shown = {name: f"{newest[name]:.4g}" for name in names}
                    bar.set_postfix(shown, refresh=False)
                done = newest.get(count, 0) if "total_steps" in newest else state["sums"].get(count, 0)
                bar.update(done - bar.n)

    thread = threading.Thread(target=follow, name="progress", daemon=True)
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def read_events(run: RunDirectory) -> list[dict[str, Any]]:
    """Every event of metrics.jsonl; a last line that a kill cut off is left out."""
    events = []
    for line in (run.read_text("metrics.jsonl") or "").splitlines():
        with contextlib.suppress(json.JSONDecodeError):
            events.append(json.loads(line))
    return events
