"""The trackers get the numbers of metrics.jsonl, read back with what each of them reads with.

python -m pytest tests/unit/monitoring/test_trackers.py

TensorBoard's reader comes with the test requirements. MLflow and Weights & Biases are too large for them: to run their
tests, pip install mlflow wandb.
"""

from __future__ import annotations

import importlib.util
import json
import math
import os
import struct
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config, to_yaml
from mipo_ray.errors import UserError
from mipo_ray.monitoring import trackers
from mipo_ray.monitoring.trackers import Trackers, check_trackers, run_parameters
from mipo_ray.run import main as run_command
from mipo_ray.storage.run_directory import RunDirectory, open_run

EVENTS: list[dict[str, Any]] = [
    {"time": 1000.5, "round": None, "stage": "evaluate", "event": "results", "pmi_initial": 4.0},
    {"time": 1001.0, "round": 0, "stage": "train", "event": "train_step", "step": 0, "loss": 0.6931, "ok": True},
    {"time": 1002.0, "round": 0, "stage": "train", "event": "train_step", "step": 1, "loss": 0.5, "why": "text"},
    {"time": 1003.0, "round": 0, "stage": "evaluate", "event": "results", "pmi_initial": 13.1},
]
LATER = {"time": 1004.0, "round": 1, "stage": "train", "event": "train_step", "step": 0, "loss": 0.4}
LOSSES = [(0, 0.6931), (1, 0.5), (2, 0.4)]


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> RunDirectory:
    for variable in list(os.environ):
        if variable.startswith(("MLFLOW_", "WANDB_")):
            monkeypatch.delenv(variable)
    directory = open_run(str(tmp_path / "run"))
    directory.write_text("config.yaml", to_yaml(load_config(overrides=["train.beta=0.2"])))
    return directory


def track(name: str, run: RunDirectory, before: list[dict[str, Any]], events: list[dict[str, Any]]) -> None:
    """One process of a run: it takes note of the events of earlier ones and passes its own on."""
    process = Trackers()
    for event in before:
        process.count(event)
    process.open([name], run, {})
    for event in events:
        process.log(event)
    process.flush()
    assert name in process._open
    process.close(True)


def track_twice(name: str, run: RunDirectory) -> None:
    """A run that was interrupted and went on."""
    track(name, run, [], EVENTS)
    track(name, run, EVENTS, [LATER])


def missing(package: str) -> Any:
    return pytest.mark.skipif(importlib.util.find_spec(package) is None, reason=f"needs the package {package}")


@missing("tensorboard")
@pytest.mark.parametrize("url", ["{}", "memory://bucket{}"])
def test_tensorboard_reads_the_numbers_back(run: RunDirectory, tmp_path: Path, url: str) -> None:
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer

    place = open_run(url.format(tmp_path / "run"))
    track_twice("tensorboard", place)
    files = tmp_path / "files"
    place.filesystem.get(place.path("trackers/tensorboard"), str(files), recursive=True)
    reader = EventMultiplexer().AddRunsFromDirectory(str(files)).Reload()
    (name,) = reader.Runs()
    assert set(reader.Runs()[name]["scalars"]) == {
        "evaluate/results/pmi_initial",
        "train/train_step/step",
        "train/train_step/loss",
    }
    losses = reader.Scalars(name, "train/train_step/loss")
    assert [(scalar.step, pytest.approx(scalar.value)) for scalar in losses] == LOSSES
    assert [scalar.wall_time for scalar in losses] == [1001.0, 1002.0, 1004.0]


@missing("mlflow")
def test_mlflow_reads_the_numbers_back(run: RunDirectory) -> None:
    from mlflow.tracking import MlflowClient

    track_twice("mlflow", run)
    client = MlflowClient(tracking_uri=f"sqlite:///{run.path('trackers/mlflow.db')}")
    (experiment,) = client.search_experiments(filter_string="name = 'mipo-ray'")
    (found,) = client.search_runs([experiment.experiment_id])  # one run, though two processes
    losses = client.get_metric_history(found.info.run_id, "train/train_step/loss")
    assert [(metric.step, metric.value) for metric in losses] == LOSSES
    assert [metric.timestamp for metric in losses] == [1001000, 1002000, 1004000]
    assert found.data.params["train.beta"] == "0.2"
    assert found.info.status == "FINISHED"


def test_mlflow_without_an_address_needs_a_local_run(monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("mlflow", reason="needs the package mlflow")
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI"):
        Trackers().open(["mlflow"], open_run("memory://bucket/run"), {})


@missing("wandb")
def test_wandb_offline_has_the_numbers(run: RunDirectory) -> None:
    from wandb.proto import wandb_internal_pb2

    # In a process of its own, as in the actor; its service ends with it.
    program = (
        "from tests.unit.monitoring.test_trackers import track_twice;"
        "from mipo_ray.storage.run_directory import open_run;"
        f"track_twice('wandb', open_run({run.url!r}))"
    )
    environment = {**os.environ, "WANDB_MODE": "offline", "PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    losses, ids = [], set()
    for file in sorted(Path(run.path("trackers/wandb")).glob("offline-run-*/*.wandb")):
        for content in wandb_records(file.read_bytes()):
            record = wandb_internal_pb2.Record.FromString(content)
            if record.WhichOneof("record_type") == "run":
                ids.add(record.run.run_id)
                parameters = {item.key: json.loads(item.value_json) for item in record.run.config.update}
                assert parameters["train.beta"] == 0.2
            if record.WhichOneof("record_type") == "history":
                items = record.history.item
                row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}
                if "train/train_step/loss" in row:
                    losses.append((row["train/train_step/index"], row["train/train_step/loss"]))
    assert losses == LOSSES
    assert len(ids) == 1


def wandb_records(content: bytes) -> Iterator[bytes]:
    """The records of a .wandb file: a header of 7 bytes, then LevelDB's log format in blocks of 32 KiB."""
    block, record, position = 32768, b"", 7
    while position + 7 <= len(content):
        if block - position % block < 7:  # too short for a header: padding
            position += block - position % block
            continue
        length, kind = struct.unpack("<HB", content[position + 4 : position + 7])
        record += content[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (1, 4):  # a full record, or the last part of one
            yield record
            record = b""


def test_a_tracker_that_is_not_installed_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("no_such_module", "wandb"))
    with pytest.raises(UserError, match=r"trackers: wandb needs the package wandb.*pip install wandb"):
        check_trackers(["tensorboard", "wandb"])


def test_the_command_refuses_it_before_anything_starts(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", ("no_such_module", "mlflow"))
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert run_command([f"run_dir={tmp_path / 'run'}", "trackers=[mlflow]"]) == 2
    assert "trackers: mlflow needs the package mlflow" in capsys.readouterr().err
    assert not any(Path(tmp_path).glob("run/*"))


def test_the_configuration_names_the_trackers_it_knows() -> None:
    assert load_config(overrides=["trackers=[tensorboard, wandb]"]).trackers == ("tensorboard", "wandb")
    assert load_config().trackers == ()
    with pytest.raises(UserError, match=r"trackers.*'tensorboard', 'mlflow' or 'wandb'"):
        load_config(overrides=["trackers=[comet]"])


def test_no_tracker_is_imported_unless_asked_for() -> None:
    program = "import sys, mipo_ray.monitoring.trackers, mipo_ray.config.schema; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    assert not {"tensorboardX", "mlflow", "wandb"} & set(done.stdout.split())


class FakeBrokenTracker:
    """A tracker whose server goes away after the first event."""

    def __init__(self, run: RunDirectory) -> None:
        self.logged = 0

    def log(self, prefix: str, numbers: Any, step: int, seconds: float) -> None:
        self.logged += 1
        if self.logged > 1:
            raise ConnectionError("server went away")

    def flush(self) -> None: ...

    def close(self, succeeded: bool) -> None: ...


def test_a_tracker_that_fails_on_the_way_is_left_out(
    run: RunDirectory, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setitem(trackers._STARTERS, "wandb", FakeBrokenTracker)
    monkeypatch.setitem(trackers.PACKAGES, "wandb", ("json", "wandb"))
    process = Trackers()
    process.open(["tensorboard", "wandb"], run, {})
    for event in EVENTS:
        process.log(event)
    assert list(process._open) == ["tensorboard"]
    assert capsys.readouterr().err.count("tracker wandb failed and gets no more numbers: ConnectionError") == 1
    process.close(True)


def test_a_tracker_that_does_not_start_is_named(run: RunDirectory, monkeypatch: pytest.MonkeyPatch) -> None:
    def starts(run: RunDirectory) -> Any:
        raise PermissionError("wrong key")

    monkeypatch.setitem(trackers._STARTERS, "tensorboard", starts)
    with pytest.raises(UserError, match="trackers: tensorboard does not start: PermissionError: wrong key"):
        Trackers().open(["tensorboard"], run, {})


def test_parameters_are_flat_and_without_credentials(run: RunDirectory) -> None:
    run.write_text("config.yaml", "run_dir: s3://key:secret@bucket/run\ntrain: {beta: 0.2, adam_betas: [0.9, 0.95]}\n")
    assert run_parameters(run) == {
        "run_dir": "s3://(not shown)@bucket/run",
        "train.beta": 0.2,
        "train.adam_betas": [0.9, 0.95],
    }


def test_numbers_that_are_not_finite_pass(run: RunDirectory) -> None:
    process = Trackers()
    process.open(["tensorboard"], run, {})
    process.log({**LATER, "loss": math.nan})
    assert list(process._open) == ["tensorboard"]
    process.close(False)
