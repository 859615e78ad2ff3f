"""The table of metrics: its names follow one scheme, and its labels hold no secret.

python -m pytest tests/unit/monitoring/test_metrics.py
"""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.measures import HELD_OUT
from mipo_ray.monitoring import ray_metrics
from mipo_ray.monitoring.idle import IdleClock
from mipo_ray.monitoring.metrics import LABELS, METRICS, MOST_LABEL_CHARACTERS, Metric, round_label, run_label
from mipo_ray.monitoring.ray_metrics import ACTIVE, LAST_PROGRESS, RayMetrics
from mipo_ray.pairs.statistics import merge_statistics
from mipo_ray.storage.pair_statistics import Histograms

REWARDS = {f"mipo_pairs_reward_{name}" for name in ("mean", "low", "high", "margin_mean")}
WITHOUT_UNIT = {"mipo_stage_active", "mipo_train_gradient_norm", "mipo_train_learning_rate", *REWARDS}


@pytest.mark.parametrize("metric", METRICS, ids=lambda metric: f"{metric.event}-{metric.name}")
def test_a_name_says_its_unit(metric: Metric) -> None:
    assert re.fullmatch(r"mipo(_[a-z0-9]+)+", metric.name)
    assert metric.help
    assert metric.name.endswith("_total") == (metric.kind == "counter")
    if metric.name in WITHOUT_UNIT:
        assert not metric.unit
    else:
        assert metric.name.removesuffix("_total").endswith(f"_{metric.unit}")
    assert not {*LABELS, "le", "WorkerId"} & set(metric.labels)


def test_a_name_stands_for_one_metric_and_a_number_for_one_name() -> None:
    kinds = {(metric.name, metric.kind, metric.unit, metric.labels) for metric in METRICS}
    assert len(kinds) == len({metric.name for metric in METRICS})
    keys = [(metric.event, metric.key) for metric in METRICS if metric.event]
    assert len(keys) == len(set(keys))


def test_everything_that_is_measured_has_a_metric() -> None:
    assert {metric.key for metric in METRICS if metric.event == "results"} == set(HELD_OUT)
    statistics = vars(merge_statistics([]))
    nested = {name for name, value in statistics.items() if isinstance(value, dict | str | Histograms)}
    assert {metric.key for metric in METRICS if metric.event == "pairs"} == set(statistics) - nested


@pytest.mark.parametrize(
    ("url", "label"),
    [
        ("/runs/demo", "/runs/demo"),
        ("/runs/what?#@", "/runs/what?#@"),
        ("s3://bucket/run", "s3://bucket/run"),
        ("s3://key:secret@bucket/run", "s3://bucket/run"),
        ("https://token@host/run?signature=secret#part", "https://host/run"),
        ("https://host?signature=secret", "https://host"),
        ("https://user:p@ss@host:9000/run/", "https://host:9000/run/"),
        ("abfs://container@account.dfs.core.windows.net/run", "abfs://container@account.dfs.core.windows.net/run"),
        ("abfs://container:key@account/run", "abfs://account/run"),
    ],
)
def test_a_run_is_labelled_without_secrets(url: str, label: str) -> None:
    assert run_label(url) == label


@given(host=st.from_regex(r"[a-z]{1,9}", fullmatch=True), path=st.text(max_size=600), secret=st.uuids())
def test_labels_are_bounded_and_hide_what_stands_before_the_host(host: str, path: str, secret: object) -> None:
    label = run_label(f"s3://key:{secret}@{host}/{path}")
    assert len(label) <= MOST_LABEL_CHARACTERS
    assert str(secret) not in label
    assert run_label(label) == label


def test_long_paths_are_told_apart_by_their_end() -> None:
    first, second = (run_label(f"/{'deep/' * 100}run-{number}") for number in (1, 2))
    assert first != second
    assert first.endswith("deep/run-1")


def test_rounds_are_labelled() -> None:
    assert [round_label(index) for index in (None, 0, 12)] == ["base", "0", "12"]


class FakeRecorder:
    """Stands in for Ray's metric classes, which cannot be read back without a cluster."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, float, dict[str, str]]] = []

    def set(self, value: float, tags: dict[str, str]) -> None:
        self.seen.append(("set", value, tags))

    def observe(self, value: float, tags: dict[str, str]) -> None:
        self.seen.append(("observe", value, tags))

    def inc(self, value: float, tags: dict[str, str]) -> None:
        assert value > 0, "Ray's counters refuse this"
        self.seen.append(("inc", value, tags))


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> dict[str, FakeRecorder]:
    made: dict[str, FakeRecorder] = {}
    monkeypatch.setattr(ray_metrics, "_ray_metric", lambda metric: made.setdefault(metric.name, FakeRecorder()))
    return made


def seen(recorders: dict[str, FakeRecorder]) -> dict[str, list[tuple[str, float, dict[str, str]]]]:
    return {name: recorder.seen for name, recorder in recorders.items() if recorder.seen}


def test_an_event_is_recorded_under_the_names_of_the_table(recorders: dict[str, FakeRecorder]) -> None:
    metrics = RayMetrics("s3://key:secret@bucket/run")
    where = {"run": "s3://bucket/run", "round": "1", "stage": "generate"}
    event = {
        "event": "generated",
        "time": 50.0,
        "round": 1,
        "stage": "generate",
        "engine": "a1b2",
        "blocks_in_flight": 0,
    }
    metrics.record({**event, "rows": 8, "generated_tokens": 0, "block_seconds": 2.5, "unknown": 7})
    assert seen(recorders) == {
        LAST_PROGRESS: [("set", 50.0, where)],
        "mipo_generated_rows_total": [("inc", 8.0, {**where, "engine": "a1b2"})],
        "mipo_generated_block_duration_seconds": [("observe", 2.5, where)],
        "mipo_engine_queued_blocks": [("set", 0.0, {**where, "engine": "a1b2"})],
    }


def test_a_stage_is_active_until_it_is_committed_and_a_death_is_no_progress(recorders: dict[str, FakeRecorder]) -> None:
    metrics = RayMetrics("/run")
    for second, kind in enumerate(("stage_start", "engine_death", "stage")):
        metrics.record({"event": kind, "time": second, "round": None, "stage": "evaluate", "engine_deaths": 1})
    where = {"run": "/run", "round": "base", "stage": "evaluate"}
    assert recorders[ACTIVE].seen == [("set", 1.0, where), ("set", 0.0, where)]
    assert recorders[LAST_PROGRESS].seen == [("set", 0, where), ("set", 2, where)]
    assert recorders["mipo_engine_deaths_total"].seen == [("inc", 1.0, where)]


def test_gauges_are_repeated_those_of_a_committed_stage_only_where_they_are_its_outcome(
    recorders: dict[str, FakeRecorder],
) -> None:
    metrics = RayMetrics("/run")
    step = {"event": "train_step", "stage": "train", "loss": 0.5}
    metrics.record({**step, "time": 1.0, "round": 0})
    metrics.record({"event": "stage", "time": 2.0, "round": 0, "stage": "train", "stage_seconds": 3.0})
    metrics.record({**step, "time": 4.0, "round": 1})
    for recorder in recorders.values():
        recorder.seen.clear()
    metrics.repeat()
    first, second = ({"run": "/run", "round": index, "stage": "train"} for index in "01")
    assert seen(recorders) == {
        ACTIVE: [("set", 0.0, first)],
        LAST_PROGRESS: [("set", 2.0, first), ("set", 4.0, second)],
        "mipo_stage_duration_seconds": [("set", 3.0, first)],
        "mipo_train_loss_nats": [("set", 0.5, second)],
    }


def test_a_run_that_goes_on_shows_what_was_measured_before_and_nothing_else(
    recorders: dict[str, FakeRecorder],
) -> None:
    metrics = RayMetrics("/run")
    metrics.restore({"event": "results", "time": 1.0, "round": None, "stage": "evaluate", "response_tokens": 40.0})
    metrics.restore({"event": "generated", "time": 2.0, "round": 0, "stage": "generate", "engine": "a", "rows": 8})
    where = {"run": "/run", "round": "base", "stage": "evaluate"}
    assert seen(recorders) == {"mipo_held_out_response_tokens": [("set", 40.0, where)]}


class FakeTime:
    """A clock that the test sets."""

    seconds = 100.0

    def __call__(self) -> float:
        return self.seconds


def test_idle_time_is_that_without_any_work() -> None:
    now = FakeTime()
    clock = IdleClock(2.0, now)
    now.seconds += 30  # the model is loaded
    clock.work_begins()
    now.seconds += 5
    clock.work_begins()
    now.seconds += 5
    clock.work_ends()
    now.seconds += 5
    clock.work_ends()
    assert clock.take() == {"idle_gpu_seconds": 60.0}
    now.seconds += 7
    clock.work_begins()
    assert clock.take() == {"idle_gpu_seconds": 14.0}
    assert clock.take() == {"idle_gpu_seconds": 0.0}


def test_idle_time_between_steps_of_known_length() -> None:
    now = FakeTime()
    clock = IdleClock(8.0, now)
    now.seconds += 20
    clock.work_was(15.0)
    now.seconds += 3
    clock.work_was(3.0)
    assert math.isclose(clock.take()["idle_gpu_seconds"], 40.0)


def test_no_gpu_no_idle_time() -> None:
    assert IdleClock(0.0).take() == {}
