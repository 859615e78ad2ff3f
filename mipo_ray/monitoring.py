"""The one place that emits metrics: metrics.jsonl in the run directory, and Ray metrics with the same names.

An event is a flat dict: `time` (seconds since the epoch), `round` (null for the base), `stage`, `event`, and numbers by
name. Every number is also a Ray gauge `mipo_<name>` with the tags run, round and stage, and what COUNTERS lists is a
counter `mipo_<name>_sum` as well (Ray's endpoint puts `ray_` before each).
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import ray
from ray.util.metrics import Counter, Gauge

from mipo_ray.storage import RunDirectory

COUNTERS = ("rows", "generated_tokens", "pairs", "trained_tokens")
FLUSH_SECONDS = 5.0
TAGS = ("run", "round", "stage")


class EventWriter:
    """Appends events to metrics.jsonl and to Ray's metrics. One per run, as the Ray actor that `start` makes."""

    def __init__(self, run: RunDirectory):
        self._run = run
        self._latest: dict[str, dict[str, Any]] = {}
        self._pending: list[str] = []
        self._flushed = time.monotonic()
        # An object store cannot append: there the whole object is written anew at each flush.
        self._stored = "" if run.is_local else (run.read_text("metrics.jsonl") or "")
        self._gauges: dict[str, Gauge] = {}
        self._counters = {
            name: Counter(f"mipo_{name}_sum", description=f"sum of {name}", tag_keys=TAGS) for name in COUNTERS
        }

    def emit(self, event: dict[str, Any]) -> None:
        """Records one event; it is on storage within a few seconds, or at the next `flush`."""
        event = {"time": time.time(), **event}
        self._latest[str(event.get("event"))] = event
        self._pending.append(json.dumps(event))
        tags = {"run": self._run.url, "round": str(event.get("round")), "stage": str(event.get("stage"))}
        for name, value in event.items():
            if isinstance(value, bool) or not isinstance(value, int | float) or name in ("time", "round"):
                continue
            if name not in self._gauges:
                self._gauges[name] = Gauge(f"mipo_{name}", description=name.replace("_", " "), tag_keys=TAGS)
            self._gauges[name].set(float(value), tags=tags)
            if name in self._counters and value > 0:
                self._counters[name].inc(float(value), tags=tags)
        if time.monotonic() - self._flushed > FLUSH_SECONDS:
            self.flush()

    def latest(self, name: str) -> dict[str, Any] | None:
        """The newest event of a kind."""
        return self._latest.get(name)

    def flush(self) -> None:
        """Brings every event to storage."""
        self._flushed = time.monotonic()
        if not self._pending:
            return
        lines = "".join(line + "\n" for line in self._pending)
        self._pending.clear()
        if self._run.is_local:
            os.makedirs(self._run.root, exist_ok=True)
            with open(self._run.path("metrics.jsonl"), "a", encoding="utf-8") as file:
                file.write(lines)
        else:
            self._stored += lines
            self._run.write_text("metrics.jsonl", self._stored)


@dataclass(frozen=True)
class Events:
    """Sends the events of one stage to the writer; travels to actors and workers."""

    writer: Any
    round_index: int | None = None
    stage: str = "run"

    def emit(self, event: dict[str, Any]) -> None:
        """Records an event without waiting for it."""
        self.writer.emit.remote({"round": self.round_index, "stage": self.stage, **event})

    def at(self, round_index: int | None, stage: str) -> Events:
        """The same writer for another stage."""
        return Events(self.writer, round_index, stage)

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
def training_progress(events: Events, description: str) -> Iterator[None]:
    """A progress bar over optimizer steps on the driver, fed by the newest `train_step` event."""
    from tqdm import tqdm

    stop = threading.Event()

    def follow() -> None:
        with tqdm(desc=description, unit="step", mininterval=2.0) as bar:
            finished = False
            while not finished:
                finished = stop.wait(1.0)
                step = ray.get(events.writer.latest.remote("train_step"))
                if step is None or step["round"] != events.round_index:
                    continue
                bar.total = step["total_steps"]
                bar.set_postfix(
                    loss=f"{step['loss']:.4f}",
                    margin=f"{step['reward_margin']:.3f}",
                    accuracy=f"{step['reward_accuracy']:.2f}",
                    refresh=False,
                )
                bar.update(step["step"] - bar.n)

    thread = threading.Thread(target=follow, name="training-progress", daemon=True)
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
