"""Events as Ray metrics: what `metric_table` says, on the metrics endpoint of the node that the writer runs on."""

from __future__ import annotations

from typing import Any

from ray.util.metrics import Counter, Gauge, Histogram

from mipo_ray.metric_table import BUCKETS_SECONDS, LABELS, METRICS, Metric, round_label, run_label

ACTIVE, LAST_PROGRESS = "mipo_stage_active", "mipo_stage_last_progress_timestamp_seconds"


class RayMetrics:
    """Records events of one run. Ray exports them every 10 seconds (RAY_metrics_report_interval_ms)."""

    def __init__(self, run_url: str):
        self._run = run_label(run_url)
        self._metrics = {metric.name: _ray_metric(metric) for metric in METRICS}
        self._by_event: dict[str, list[Metric]] = {}
        for metric in METRICS:
            self._by_event.setdefault(metric.event, []).append(metric)

    def record(self, event: dict[str, Any]) -> None:
        """Records the numbers of one event, that its stage made progress, and whether the stage is under way."""
        kind = event.get("event")
        labels = self._labels(event)
        if kind != "engine_death":
            self._metrics[LAST_PROGRESS].set(event["time"], tags=labels)
        if kind in ("stage_start", "stage"):
            self._metrics[ACTIVE].set(float(kind == "stage_start"), tags=labels)
        for metric in self._by_event.get(str(kind), ()):
            self._record(metric, event.get(metric.key), labels | {name: str(event.get(name)) for name in metric.labels})

    def restore(self, event: dict[str, Any]) -> None:
        """Shows again what an earlier process of the run measured, so that the next rounds can be compared with it."""
        if event.get("event") == "results":
            for metric in self._by_event["results"]:
                self._record(metric, event.get(metric.key), self._labels(event))

    def _labels(self, event: dict[str, Any]) -> dict[str, str]:
        return {"run": self._run, "round": round_label(event.get("round")), "stage": str(event.get("stage"))}

    def _record(self, metric: Metric, value: Any, labels: dict[str, str]) -> None:
        if not number(value):
            return
        recorder = self._metrics[metric.name]
        if metric.kind == "gauge":
            recorder.set(float(value), tags=labels)
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
