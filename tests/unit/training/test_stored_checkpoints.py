"""Checkpoints in a run directory, on a disk and on an S3 server that fails: which one a training goes on from.

Ray Train is a stand-in here; tests/nightly/test_training_resumed.py has the real one.

python -m pytest tests/unit/training/test_stored_checkpoints.py
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
from ray.train.v2._internal.constants import CHECKPOINT_MANAGER_SNAPSHOT_FILENAME

from mipo_ray import paths
from mipo_ray.config.recipe import load_config
from mipo_ray.monitoring.events import Events
from mipo_ray.session import Session, Stage
from mipo_ray.storage.faults import StorageFault
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training import ray_worker
from mipo_ray.training.checkpoint_books import BOOKS, drop_damaged_books
from mipo_ray.training.whole_checkpoints import NOTED, PROGRESS, note_files
from tests.helpers.faulty_proxy import always, no_faults
from tests.helpers.s3_server import Bucket

pytestmark = pytest.mark.usefixtures("process_group")

STAGE = "rounds/000/train"
PLACE = f"{STAGE}/{ray_worker.CHECKPOINTS}"


@dataclass(frozen=True)
class HeardEvents(Events):
    heard: list[dict[str, Any]] = field(default_factory=list)

    def at(self, round: Round, stage: str) -> HeardEvents:
        return self

    def emit(self, event: dict[str, Any]) -> None:
        self.heard.append(event)


class FakeRayTrain:
    """Names checkpoints by their number, and lists those whose upload is done."""

    def __init__(self) -> None:
        self.listed: list[ray.train.Checkpoint] = []
        self.begun = 0

    def report(self, _: Any, checkpoint: Any, checkpoint_upload_fn: Callable[..., ray.train.Checkpoint]) -> None:
        self.begun += 1
        self.listed.append(checkpoint_upload_fn(checkpoint, f"checkpoint_{self.begun}"))

    def get_checkpoint(self) -> ray.train.Checkpoint | None:
        return self.listed[-1] if self.listed else None


@pytest.fixture
def ray_train(monkeypatch: pytest.MonkeyPatch) -> FakeRayTrain:
    fake = FakeRayTrain()
    monkeypatch.setattr(ray.train, "report", fake.report)
    monkeypatch.setattr(ray.train, "get_checkpoint", fake.get_checkpoint)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda **_: [], raising=False)
    monkeypatch.setattr(ray.train, "CheckpointConsistencyMode", SimpleNamespace(COMMITTED=0), raising=False)
    return fake


@pytest.fixture(params=["disk", "S3"])
def stage(request: pytest.FixtureRequest, bucket: Bucket, tmp_path: Path) -> Stage:
    return stage_of(str(tmp_path / "run") if request.param == "disk" else f"{bucket.url}/run")


def stage_of(url: str) -> Stage:
    resources: Any = None
    return Session(load_config(), open_run(url), resources, HeardEvents(None)).stage(Round(0), "train")


def publish(stage: Stage, directory: Path, number: int) -> None:
    shard = directory / f"shard-{number}"
    (shard / "state").mkdir(parents=True)
    (shard / "state/rank_0.pt").write_bytes(bytes([number]) * 1000)
    (shard / PROGRESS).write_text(json.dumps({"workers": 1, NOTED: True, "number": number}))
    note_files(shard, 0)
    ray_worker._publish(stage.run, PLACE, shard, steps=number)


def latest(stage: Stage) -> int | None:
    """The number of the checkpoint that training goes on from."""
    with ray_worker._latest(stage) as found:
        if found is None:
            return None
        number: int = json.loads((found / PROGRESS).read_text())["number"]
        assert (found / "state/rank_0.pt").read_bytes() == bytes([number]) * 1000
    return number


def warnings(stage: Stage) -> list[str]:
    events: Any = stage.events
    return [event["text"] for event in events.heard if event["event"] == "warning"]


def damage(stage: Stage, number: int, kind: str) -> None:
    place = stage.path(ray_worker.CHECKPOINTS, f"checkpoint_{number}")
    filesystem, shard = stage.run.filesystem, f"{place}/state/rank_0.pt"
    if kind == "truncated shard":
        filesystem.pipe_file(shard, bytes([number]) * 500)
    elif kind == "missing file":
        filesystem.rm_file(shard)
    elif kind == "wrong checksum":
        filesystem.pipe_file(shard, bytes([number + 1]) * 1000)
    else:
        filesystem.rm(place, recursive=True)


@pytest.mark.parametrize("kind", ["truncated shard", "missing file", "wrong checksum", "gone"])
def test_a_damaged_one_falls_back_to_the_one_before_and_then_to_the_beginning(
    kind: str, stage: Stage, tmp_path: Path, ray_train: FakeRayTrain
) -> None:
    assert latest(stage) is None
    assert warnings(stage) == []  # nothing was there
    for number in (1, 2):
        publish(stage, tmp_path, number)
    assert (latest(stage), warnings(stage)) == (2, [])
    damage(stage, 2, kind)
    assert latest(stage) == 1
    assert "warning: training goes on from checkpoint_1, since checkpoint_2: " in warnings(stage)[0]
    damage(stage, 1, kind)
    assert latest(stage) is None
    assert warnings(stage)[1].startswith(
        "warning: training starts from the beginning of the round, since no checkpoint in "
    )


def test_an_upload_that_fails_is_never_listed_nor_taken(
    bucket: Bucket, tmp_path: Path, ray_train: FakeRayTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """After each number of its files: one has three."""
    config = {"connect_timeout": 1, "read_timeout": 1, "retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setattr(paths, "S3_CLIENT", paths.S3_CLIENT | {"config_kwargs": config})
    stage = stage_of(f"{bucket.url}/run")
    publish(stage, tmp_path, 1)
    for uploaded in range(3):
        left = [uploaded]

        def plan(request: Any, left: list[int] = left) -> Any:
            left[0] -= request.method == "PUT"
            return "unavailable" if left[0] < 0 else None

        bucket.proxy.plan = plan
        with pytest.raises(StorageFault, match="cannot be written: ServiceUnavailable"):
            publish(stage, tmp_path, 2 + uploaded)
        bucket.proxy.plan = no_faults
        assert [checkpoint.path[-1] for checkpoint in ray_train.listed] == ["1"]
        assert (latest(stage), warnings(stage)) == (1, [])
    # Also where Ray Train's list is lost.
    ray_train.listed.clear()
    assert latest(stage) == 1
    publish(stage, tmp_path, 5)
    assert latest(stage) == 5


def test_storage_that_does_not_answer_is_no_damage(
    bucket: Bucket, tmp_path: Path, ray_train: FakeRayTrain, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training must not start from its beginning since its checkpoints could not be read for a while."""
    config = {"connect_timeout": 1, "read_timeout": 1, "retries": {"mode": "standard", "total_max_attempts": 1}}
    monkeypatch.setattr(paths, "S3_CLIENT", paths.S3_CLIENT | {"config_kwargs": config})
    stage = stage_of(f"{bucket.url}/run")
    publish(stage, tmp_path, 1)
    for plan in (always("unavailable", "GET"), always("denied", "GET"), always("unavailable", "GET", "rank_0.pt")):
        bucket.proxy.plan = plan
        with pytest.raises(StorageFault):
            latest(stage)
    bucket.proxy.plan = no_faults
    assert (latest(stage), warnings(stage)) == (1, [])


# Ray Train's list.


def books(*names: str) -> str:
    return json.dumps({"ray_version": "2", "checkpoint_results": [{"checkpoint_dir_name": name} for name in names]})


@pytest.mark.parametrize(
    ("text", "wrong"),
    [
        (books("checkpoint_1"), ""),
        (books(), ""),
        (books("checkpoint_1", "checkpoint_2"), "names checkpoint_2, which is gone"),
        (books("checkpoint_1")[:-9], "cannot be read"),
        ("", "cannot be read"),
        ("[]", "cannot be read"),
        ('{"checkpoint_results": [3]}', "cannot be read"),
    ],
)
def test_a_list_with_which_ray_train_would_not_start_is_dropped(text: str, wrong: str, stage: Stage) -> None:
    assert drop_damaged_books(stage.run, PLACE) == ""
    stage.run.write_text(f"{PLACE}/checkpoint_1/state", "weights")
    stage.run.write_text(f"{PLACE}/{BOOKS}", text)
    assert drop_damaged_books(stage.run, PLACE) == wrong
    assert (stage.run.read_text(f"{PLACE}/{BOOKS}") is None) == bool(wrong)
    assert f"{ray_worker.CHECKPOINTS}/checkpoint_1/state" in stage.run.list_files(STAGE)


def test_the_list_is_where_ray_train_has_it() -> None:
    from ray.train.v2._internal.execution.checkpoint.checkpoint_manager import (
        _CheckpointManagerState,
        _TrainingResultState,
    )

    assert BOOKS == CHECKPOINT_MANAGER_SNAPSHOT_FILENAME
    assert "checkpoint_results" in _CheckpointManagerState.model_fields
    assert "checkpoint_dir_name" in _TrainingResultState.model_fields
