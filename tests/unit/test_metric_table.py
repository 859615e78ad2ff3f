"""The table of metrics: its names follow one scheme, and its labels hold no secret.

python -m pytest tests/unit/test_metric_table.py
"""

from __future__ import annotations

import math
import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.evaluation.results import UNITS
from mipo_ray.idle import IdleClock
from mipo_ray.metric_table import LABELS, METRICS, MOST_LABEL_CHARACTERS, Metric, round_label, run_label
from mipo_ray.pair_statistics import merge_statistics
from mipo_ray.pairs import PAIR_SCHEMA

WITHOUT_UNIT = {"mipo_stage_active", "mipo_train_gradient_norm", "mipo_train_learning_rate"}


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
    assert {metric.key for metric in METRICS if metric.event == "results"} == set(UNITS)
    statistics = merge_statistics([])
    nested = {name for name, value in statistics.items() if isinstance(value, dict | str)}
    assert {metric.key for metric in METRICS if metric.event == "pairs"} == set(statistics) - nested
    assert PAIR_SCHEMA.empty_table().num_rows == 0


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
