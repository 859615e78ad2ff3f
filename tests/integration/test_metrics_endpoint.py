"""What Ray's own metrics endpoint shows of a run, without Prometheus (with it: tests/nightly/test_metrics.py).

python -m pytest tests/integration/test_metrics_endpoint.py
"""

from __future__ import annotations

import json
import math
import re

import pytest

from mipo_ray.monitoring.metrics import METRICS
from tests.helpers.golden_run import GoldenRun, prometheus_label
from tests.helpers.runs import events


def shown(golden_run: GoldenRun, name: str, round_label: str) -> list[float]:
    """The values of the run's series of one name and round."""
    lines = [line for line in golden_run.metrics.splitlines() if line.startswith(f"{name}{{")]
    own = [f'run="{prometheus_label(golden_run.directory)}"', f'round="{round_label}"']
    return [float(line.rsplit(" ", 1)[1]) for line in lines if all(label in line for label in own)]


@pytest.mark.parametrize("measure", ["pmi_initial", "reward_margin"])
@pytest.mark.parametrize("policy", ["base", "0", "1"])
def test_the_endpoint_shows_the_numbers_of_the_run_directory(golden_run: GoldenRun, policy: str, measure: str) -> None:
    results = json.loads((golden_run.directory / "results.json").read_text())
    found = shown(golden_run, f"ray_mipo_held_out_{measure}_nats", policy)
    assert found == [pytest.approx(results[policy][measure]["value"])]


def test_the_endpoint_names_only_metrics_of_the_table(golden_run: GoldenRun) -> None:
    families = set(re.findall(r"^# TYPE ray_(mipo_\w+) ", golden_run.metrics, re.MULTILINE))
    known = {metric.name for metric in METRICS}
    assert {name.removesuffix("_total") for name in families} <= {name.removesuffix("_total") for name in known}
    assert len(families) > 10


def test_every_number_of_an_event_is_in_the_table(golden_run: GoldenRun) -> None:
    known = {(metric.event, metric.key) for metric in METRICS}
    seen = events(golden_run.directory)
    assert {"pairs", "train_step", "results"} <= {event["event"] for event in seen}
    # What tasks and judges find stands in evaluation.json; the names of tasks are their users'.
    for event in (event for event in seen if event["event"] not in ("task", "judged")):
        numbers = {key for key, value in event.items() if isinstance(value, int | float) and math.isfinite(value)}
        for key in numbers - {"time", "round"}:
            assert (event["event"], key) in known
