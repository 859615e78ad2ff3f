"""Events as Ray metrics: what `metrics` says, on the metrics endpoint of the node that the writer runs on."""

from __future__ import annotations

import threading
import time
from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from mipo_ray.monitoring.metrics import BUCKETS_SECONDS, LABELS, METRICS, Metric, ascii_label, round_label, run_label

# Ray forgets a gauge that was not set again within two of its exports (one second each at the fastest).
REPEAT_SECONDS = 1.0

# Events whose gauges say what goes on in a stage; they end with it. The others' stay until the run ends.
PASSING = ("engine_start", "weight_swap", "generated", "train_step")

ACTIVE, LAST_PROGRESS = "mipo_stage_active", "mipo_stage_last_progress_timestamp_seconds"


class RayMetrics:
    """Records events of one run. Ray exports them every 10 seconds (RAY_metrics_report_interval_ms)."""

    def __init__(self, run_url: str):
        self._run = ascii_label(run_label(run_url))
        # What every gauge shows: (name, labels) -> value.
        self._shown: dict[tuple[str, frozenset[tuple[str, str]]], float] = {}
        self._lock = threading.Lock()
        self._metrics = {metric.name: _ray_metric(metric) for metric in METRICS}
        self._by_event: dict[str, list[Metric]] = {}
        for metric in METRICS:
            self._by_event.setdefault(metric.event, []).append(metric)

    def record(self, event: dict[str, Any]) -> None:
        """Records the numbers of one event, that its stage made progress, and whether the stage is under way."""
        kind = event.get("event")
        labels = self._labels(event)
        if kind != "engine_death":
            self._show(LAST_PROGRESS, event["time"], labels)
        if kind in ("stage_start", "stage"):
            self._show(ACTIVE, float(kind == "stage_start"), labels)
        if kind == "stage":
            self._end_stage(labels)
        for metric in self._by_event.get(str(kind), ()):
            own = {name: ascii_label(str(event.get(name))) for name in metric.labels}
            self._record(metric, event.get(metric.key), labels | own)

    def restore(self, event: dict[str, Any]) -> None:
        """Shows again what an earlier process of the run measured, so that the next rounds can be compared with it."""
        if event.get("event") == "results":
            for metric in self._by_event["results"]:
                self._record(metric, event.get(metric.key), self._labels(event))

    def repeat(self) -> None:
        """Sets every gauge again to what it shows."""
        with self._lock:
            for (name, labels), value in self._shown.items():
                self._metrics[name].set(value, tags=dict(labels))

    def keep_repeating(self) -> None:
        """Repeats in a thread for as long as this process lives, and so for as long as its run does."""

        def run() -> None:
            while True:
                time.sleep(REPEAT_SECONDS)
                self.repeat()

        threading.Thread(target=run, name="gauges", daemon=True).start()

    def _show(self, name: str, value: float, labels: dict[str, str]) -> None:
        with self._lock:
            self._shown[name, frozenset(labels.items())] = value
            self._metrics[name].set(value, tags=labels)

    def _end_stage(self, labels: dict[str, str]) -> None:
        passing = {metric.name for metric in METRICS if metric.event in PASSING}
        with self._lock:
            for name, shown in list(self._shown):
                if name in passing and labels.items() <= dict(shown).items():
                    del self._shown[name, shown]

    def _labels(self, event: dict[str, Any]) -> dict[str, str]:
        return {
            "run": self._run,
            "round": round_label(event.get("round")),
            "stage": ascii_label(str(event.get("stage"))),
        }

    def _record(self, metric: Metric, value: Any, labels: dict[str, str]) -> None:
        if not number(value):
            return
        recorder = self._metrics[metric.name]
        if metric.kind == "gauge":
            self._show(metric.name, float(value), labels)
        elif metric.kind == "histogram":
            recorder.observe(float(value), tags=labels)
        elif value > 0:  # Ray's counters refuse 0
            recorder.inc(float(value), tags=labels)


def number(value: Any) -> bool:
    """Whether a value of an event is a number."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _ray_metric(metric: Metric) -> Any:
    keys = (*LABELS, *metric.labels)
    if metric.kind == "histogram":
        return Histogram(metric.name, metric.help, boundaries=list(BUCKETS_SECONDS), tag_keys=keys)
    if metric.kind == "counter":
        # Ray's endpoint adds the _total.
        return Counter(metric.name.removesuffix("_total"), metric.help, tag_keys=keys)
    return Gauge(metric.name, metric.help, tag_keys=keys)
