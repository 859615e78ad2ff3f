"""A real Prometheus scrapes a Ray cluster during a run of the command: every series that is shown has data.

python -m pytest tests/nightly/test_metrics.py

The cluster is one of its own: every dataset leaves its histograms on Ray's endpoint for as long as the cluster lives,
and that of a session with many runs takes longer than Prometheus waits here. Skipped where prometheus and promtool are
missing (Debian: apt-get install prometheus).
"""

from __future__ import annotations

import json
import math
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.parse
import urllib.request
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray.monitoring.metrics import METRICS
from tests.helpers.labelled_cluster import LabelledCluster, labelled_cluster

REPOSITORY = Path(__file__).resolve().parents[2]
MONITORING = REPOSITORY / "cluster" / "monitoring"
DASHBOARD = json.loads((REPOSITORY / "cluster" / "grafana" / "mipo-ray.json").read_text())
NODES = [{"num_cpus": 6, "object_store_memory": 1024**3}]
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text())["groups"][0]["rules"]

# What has no series in a healthy run on a machine without a GPU.
ABSENT = {
    "ray_mipo_engine_deaths_total": "no engine died",
    "ray_mipo_quarantined_prompts_total": "no engine died of a prompt",
    "ray_mipo_weight_swap_failures_total": "no engine failed to take a policy's weights",
    "ray_vllm_num_preemptions_total": "vLLM's counter appears with the first preempted request",
    "ray_mipo_idle_gpu_seconds_total": "no GPU is reserved",
    "ray_node_gpus_utilization": "the machine has no GPU",
}

pytestmark = pytest.mark.skipif(
    shutil.which("prometheus") is None or shutil.which("promtool") is None,
    reason="needs prometheus and promtool (Debian: apt-get install prometheus)",
)


@dataclass(frozen=True)
class Prometheus:
    """A running Prometheus."""

    url: str

    def get(self, path: str, **parameters: Any) -> Any:
        """The data of one answer of its HTTP API; raises AssertionError with its error."""
        try:
            with urllib.request.urlopen(
                f"{self.url}/api/v1/{path}?{urllib.parse.urlencode(parameters, True)}"
            ) as answer:
                return json.load(answer)["data"]
        except urllib.error.HTTPError as error:
            raise AssertionError(f"{parameters}: {error.read().decode()}") from None

    def history(self, expression: str, since: float) -> list[dict[str, Any]]:
        """The series of an expression from `since` (seconds since the epoch) to now."""
        return self.get("query_range", query=expression, start=since, end=time.time(), step=1)["result"]

    def newest(self, expression: str, since: float) -> float:
        """The last value of the only series of an expression."""
        series = self.history(expression, since)
        assert len(series) == 1, (expression, series)
        return float(series[0]["values"][-1][1])


@dataclass(frozen=True)
class WatchedRun:
    """A finished run of the command and the Prometheus that watched it."""

    prometheus: Prometheus
    directory: Path
    started: float

    def events(self, kind: str | None = None) -> list[dict[str, Any]]:
        lines = map(json.loads, (self.directory / "metrics.jsonl").read_text().splitlines())
        return [event for event in lines if kind in (None, event["event"])]


@pytest.fixture(scope="module")
def cluster(test_environment: None) -> Iterator[LabelledCluster]:
    with labelled_cluster(NODES) as started:
        yield started


@pytest.fixture(scope="module")
def prometheus(cluster: LabelledCluster, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Prometheus]:
    """cluster/monitoring/prometheus.yml over the nodes that Ray lists, with a shorter interval."""
    directory = tmp_path_factory.mktemp("prometheus")
    nodes = cluster.files / "ray" / "prom_metrics_service_discovery.json"
    wait_for(nodes.exists, "Ray's list of its nodes' endpoints")
    config = yaml.safe_load((MONITORING / "prometheus.yml").read_text())
    config["global"] = {"scrape_interval": "2s", "evaluation_interval": "1s"}
    config["rule_files"] = [str(MONITORING / name) for name in config["rule_files"]]
    assert [Path(name).name for name in config["scrape_configs"][0]["file_sd_configs"][0]["files"]] == [nodes.name]
    config["scrape_configs"][0]["file_sd_configs"] = [{"files": [str(nodes)]}]
    (directory / "prometheus.yml").write_text(yaml.safe_dump(config))
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{probe.getsockname()[1]}"
    command = ["prometheus", f"--config.file={directory}/prometheus.yml", f"--storage.tsdb.path={directory}/data"]
    log = (directory / "log").open("w")
    process = subprocess.Popen([*command, f"--web.listen-address={address}"], stdout=log, stderr=log)
    try:
        wait_until_ready(process, f"http://{address}", directory / "log")
        yield Prometheus(f"http://{address}")
    finally:
        process.terminate()
        process.wait(timeout=60)
        log.close()


def wait_until_ready(process: subprocess.Popen[bytes], url: str, log: Path) -> None:
    def is_ready() -> bool:
        assert process.poll() is None, log.read_text()
        try:
            with urllib.request.urlopen(f"{url}/-/ready"):
                return True
        except OSError:
            return False

    wait_for(is_ready, "Prometheus")


def wait_for(condition: Callable[[], object], what: str) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < deadline, f"waited a minute for {what}"
        time.sleep(0.2)


@pytest.fixture(scope="module")
def watched(
    prometheus: Prometheus, cluster: LabelledCluster, tiny_model: Path, tmp_path_factory: pytest.TempPathFactory
) -> WatchedRun:
    """One round of the command, with a tracker."""
    directory = tmp_path_factory.mktemp("watched")
    for name, count in (("train", 48), ("held_out", 8)):
        rows = [
            {
                "prompt_id": f"{name}-{row}",
                "prompt": f"What about number {row}?",
                "context": f"I am user {row} of {name}.",
            }
            for row in range(count)
        ]
        (directory / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    recipe = {
        "run_dir": str(directory / "run"),
        "rounds": 1,
        "model": {"path": str(tiny_model), "max_model_len": 256},
        "prompts": {"path": str(directory / "train.jsonl")},
        "conditioning": {"block_size": 8},
        "generation": {
            "sampling": {"max_tokens": 24, "temperature": 1.0},
            "pool": {"engine_args": {"block_size": 32}},  # prompts longer than a block hit the prefix cache
        },
        "filters": {"max_length_ratio": 4.0},
        "train": {"learning_rate": 1e-3},
        "evaluate": {
            "prompts": {"path": str(directory / "held_out.jsonl")},
            "other_prompts": 2,
        },
        "trackers": ["tensorboard"],
    }
    (directory / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    started = time.time()
    command = [sys.executable, "-m", "mipo_ray.run", str(directory / "recipe.yaml"), f"ray.address={cluster.address}"]
    finished = subprocess.run(command, capture_output=True, text=True, timeout=600, env=cluster.environment)
    assert finished.returncode == 0, finished.stdout + finished.stderr
    # The endpoint shows the last numbers at least as long as two exports take, twenty seconds.
    committed = 'ray_mipo_stage_active{round="0", stage="evaluate"} == 0'
    wait_for(lambda: prometheus.history(committed, started), "the last numbers of the run")
    return WatchedRun(prometheus, directory / "run", started)


def expressions() -> list[str]:
    """Every expression of the dashboard and the alerts, with Grafana's variables filled in."""
    found = [target["expr"] for panel in DASHBOARD["panels"] for target in panel.get("targets", ())]
    found = [text.replace("$__rate_interval", "1m").replace("$run", ".*") for text in found]
    return found + [rule["expr"] for rule in ALERTS]


def series_in(expression: str) -> set[str]:
    return set(re.findall(r"ray_\w+", expression))


def test_every_series_that_a_panel_or_an_alert_uses_has_data(watched: WatchedRun) -> None:
    used = set().union(*map(series_in, expressions()))
    found = {name for name in used if watched.prometheus.history(name, watched.started)}
    assert used - found <= ABSENT.keys()
    assert len(found) > 40


def test_every_panel_shows_something(watched: WatchedRun) -> None:
    for expression in expressions()[: -len(ALERTS)]:
        if not series_in(expression) & ABSENT.keys():
            assert watched.prometheus.history(expression, watched.started), expression


def test_alerts_are_evaluated_and_silent(watched: WatchedRun) -> None:
    rules = watched.prometheus.get("rules")["groups"][0]["rules"]
    assert [rule["name"] for rule in rules] == [rule["alert"] for rule in ALERTS]
    assert {rule["health"] for rule in rules} == {"ok"}, rules
    watching = [rule["name"] for rule in rules if rule["state"] != "inactive"]
    # What a random model of two layers answers after one round is anything.
    assert not {"MipoStageStalled", "MipoEngineCrashLoop"} & set(watching)


def test_the_numbers_are_those_of_the_run_directory(watched: WatchedRun) -> None:
    run = watched.directory
    seen, since = watched.prometheus.newest, watched.started
    manifest = json.loads((run / "rounds/000/generate/manifest.json").read_text())
    statistics = manifest["statistics"]
    of_run = f'run="{run}", round="0"'
    generate = f'{of_run}, stage="generate"'
    assert seen(f"sum(ray_mipo_generated_rows_total{{{generate}}})", since) == 48
    assert seen(f"sum(ray_mipo_generated_tokens_total{{{generate}}})", since) == statistics["generated_tokens"]
    assert seen(f"ray_mipo_pairs_kept_rows{{{generate}}}", since) == statistics["kept"]
    assert seen(f"ray_mipo_stage_written_bytes_total{{{generate}}}", since) == sum(manifest["files"].values())
    dropped = watched.prometheus.history(f"ray_mipo_dropped_pairs_total{{{generate}}}", since)
    counted = {series["metric"]["reason"]: float(series["values"][-1][1]) for series in dropped}
    assert counted == statistics["dropped"]
    assert counted

    train = f'{of_run}, stage="train"'
    assert seen(f"ray_mipo_trained_pairs_total{{{train}}}", since) == statistics["kept"]
    step = watched.events("train_step")[-1]
    assert seen(f"ray_mipo_train_loss_nats{{{train}}}", since) == pytest.approx(step["loss"])
    assert seen(f"ray_mipo_train_gradient_norm{{{train}}}", since) == pytest.approx(step["gradient_norm"])

    # Also those of the last stage, after which the run ends at once.
    results = json.loads((run / "results.json").read_text())
    for policy in ("base", "0"):
        for name in ("pmi_initial", "reward_margin"):
            selector = f'ray_mipo_held_out_{name}_nats{{run="{run}", round="{policy}"}}'
            assert seen(selector, since) == pytest.approx(results[policy][name]["value"]), selector
    # The base's are shown until the end, though Ray forgets a gauge that is not set again: alerts compare with them.
    compared = (
        f'ray_mipo_held_out_response_tokens{{run="{run}", round="0"}} / on (run) '
        f'ray_mipo_held_out_response_tokens{{run="{run}", round="base"}}'
    )
    ratio = results["0"]["response_tokens"]["value"] / results["base"]["response_tokens"]["value"]
    assert seen(compared, since) == pytest.approx(ratio)
    # One engine for the base and for both policies; the second one's weights went into it.
    started = watched.prometheus.history(f'ray_mipo_engine_start_duration_seconds{{run="{run}"}}', since)
    swapped = watched.prometheus.history(f"ray_mipo_weight_swap_duration_seconds{{{of_run}}}", since)
    (engine,) = {series["metric"]["engine"] for series in started}
    assert {series["metric"]["engine"] for series in swapped} == {engine}


def test_every_number_of_an_event_is_in_the_table(watched: WatchedRun) -> None:
    known = {(metric.event, metric.key) for metric in METRICS}
    for event in watched.events():
        numbers = {key for key, value in event.items() if isinstance(value, int | float) and math.isfinite(value)}
        for key in numbers - {"time", "round"}:
            assert (event["event"], key) in known


def test_datasets_and_engines_have_names(watched: WatchedRun) -> None:
    datasets = watched.prometheus.get("label/dataset/values", start=watched.started)
    names = {re.sub(r"_[0-9A-Za-z]+_\d+$", "", name) for name in datasets}
    assert {"round_0_pairs", "round_0_training_pairs", "base_answers", "round_0_scores"} <= names, datasets


def test_a_tracker_was_written_beside(watched: WatchedRun) -> None:
    assert list((watched.directory / "trackers/tensorboard").glob("events.out.tfevents.*"))


def test_promtool_passes_the_rules_and_their_tests() -> None:
    for command in (["check", "rules", "alerts.yaml"], ["test", "rules", "alerts_test.yaml"]):
        done = subprocess.run(["promtool", *command], cwd=MONITORING, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
