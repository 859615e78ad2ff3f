"""The Grafana dashboard and the Prometheus alerts: as generated, and about series that exist.

python -m pytest tests/unit/cluster/test_dashboard.py
"""

from __future__ import annotations

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import yaml

from mipo_ray.monitoring.metrics import METRICS

CLUSTER = Path(__file__).resolve().parents[3] / "cluster"
COMMITTED = json.loads((CLUSTER / "grafana" / "mipo-ray.json").read_text())
SERIES = {metric.series + part for metric in METRICS for part in ("", "_bucket", "_count", "_sum")}


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    spec = importlib.util.spec_from_file_location("dashboard", CLUSTER / "grafana" / "dashboard.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rules() -> list[dict[str, Any]]:
    groups = yaml.safe_load((CLUSTER / "monitoring" / "alerts.yaml").read_text())["groups"]
    return [rule for group in groups for rule in group["rules"]]


def test_the_committed_dashboard_is_what_the_program_writes(generator: ModuleType) -> None:
    committed = (CLUSTER / "grafana" / "mipo-ray.json").read_text(encoding="utf-8")
    assert committed == generator.render(), "run: python cluster/grafana/dashboard.py"


def test_the_generator_runs_without_ray() -> None:
    program = f"import runpy, sys; runpy.run_path({str(CLUSTER / 'grafana' / 'dashboard.py')!r}); print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"ray", "torch", "vllm"} & set(done.stdout.split())


def test_panels_show_our_series_with_their_labels(generator: ModuleType) -> None:
    shown = [panel for panel in COMMITTED["panels"] if panel["type"] != "row"]
    assert len({panel["id"] for panel in COMMITTED["panels"]}) == len(COMMITTED["panels"])
    used = set()
    for panel in shown:
        assert panel["targets"], panel["title"]
        for target in panel["targets"]:
            names = set(re.findall(r"ray_\w+", target["expr"]))
            assert names <= SERIES | set(generator.OTHER_SERIES), target["expr"]
            used |= names
            assert all(f"{name}{{run=~" in target["expr"] for name in names & SERIES), target["expr"]
    assert set(generator.OTHER_SERIES) <= used
    # What the issue asks to be seen.
    for name in ("generated_rows_total", "generated_tokens_total", "engine_queued_blocks", "dropped_pairs_total"):
        assert f"ray_mipo_{name}" in used
    for name in ("engine_starts_total", "trained_pairs_total", "train_loss_nats", "held_out_context_pmi_initial_nats"):
        assert f"ray_mipo_{name}" in used
    for name in ("stage_duration_seconds", "stage_written_bytes_total", "idle_gpu_seconds_total"):
        assert f"ray_mipo_{name}" in used


def test_panels_do_not_overlap() -> None:
    places = set()
    for panel in COMMITTED["panels"]:
        place = panel["gridPos"]
        cells = {(place["x"] + column, place["y"] + row) for column in range(place["w"]) for row in range(place["h"])}
        assert not cells & places, panel["title"]
        assert place["x"] + place["w"] <= 24
        places |= cells


def test_the_dashboard_fits_grafanas_schema() -> None:
    """The types that Grafana generates from its schema read every field, and write it back."""
    models = pytest.importorskip("grafana_foundation_sdk.models.dashboard", reason="needs grafana-foundation-sdk")
    from grafana_foundation_sdk.cog import encoder, plugins

    plugins.register_default_plugins()
    read = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(COMMITTED)))
    assert lost(COMMITTED, read) == []
    misspelt = json.loads(json.dumps(COMMITTED).replace('"gridPos"', '"gridpos"'))
    read = json.loads(encoder.JSONEncoder().encode(models.Dashboard.from_json(misspelt)))
    assert lost(misspelt, read) != []


def lost(written: Any, read: Any, path: str = "") -> list[str]:
    """Paths of what is in one JSON value and not, or not the same, in the other."""
    if isinstance(written, dict) and isinstance(read, dict):
        return [name for key in written for name in lost(written[key], read.get(key, "nothing"), f"{path}/{key}")]
    if isinstance(written, list) and isinstance(read, list) and len(written) == len(read):
        return [
            name
            for index, pair in enumerate(zip(written, read, strict=True))
            for name in lost(*pair, f"{path}/{index}")
        ]
    return [] if written == read else [path]


@pytest.mark.parametrize("rule", rules(), ids=lambda rule: rule["alert"])
def test_an_alert_says_what_to_do_about_series_that_exist(rule: dict[str, Any]) -> None:
    names = set(re.findall(r"ray_\w+", rule["expr"]))
    assert names
    assert names <= SERIES
    assert rule["labels"]["severity"] in ("critical", "warning")
    assert "{{ $labels.run }}" in rule["annotations"]["summary"]
    assert rule["annotations"]["description"]


def test_every_alert_is_tested_to_fire() -> None:
    tests = yaml.safe_load((CLUSTER / "monitoring" / "alerts_test.yaml").read_text())["tests"]
    fired = {one["alertname"] for test in tests for one in test["alert_rule_test"] if one["exp_alerts"]}
    assert fired == {rule["alert"] for rule in rules()}
