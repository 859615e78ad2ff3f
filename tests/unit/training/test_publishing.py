"""A shard of a checkpoint is written once where the run directory is a path, and copied where it is none.

Ray Train is a stand-in here; tests/integration/test_training_ray.py has the real one.

python -m pytest tests/unit/training/test_publishing.py
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import ray.train
import torch

from mipo_ray.config.recipe import load_config
from mipo_ray.monitoring.events import NO_EVENTS
from mipo_ray.session import Session, Stage
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training import ray_worker

STAGE = "rounds/000/train"


def stage_of(run_dir: str) -> Stage:
    resources: Any = None
    return Session(load_config(), open_run(run_dir), resources, NO_EVENTS).stage(Round(0), "train")


@pytest.fixture
def reported(monkeypatch: pytest.MonkeyPatch) -> list[ray.train.Checkpoint]:
    """Checkpoints that were reported to Ray Train, which calls them checkpoint_1."""
    found: list[ray.train.Checkpoint] = []

    def report(metrics: Any, checkpoint: Any, checkpoint_upload_fn: Callable[..., ray.train.Checkpoint]) -> None:
        found.append(checkpoint_upload_fn(checkpoint, "checkpoint_1"))

    monkeypatch.setattr(ray.train, "report", report)
    monkeypatch.setattr(ray.train, "get_all_reported_checkpoints", lambda **_: [], raising=False)
    monkeypatch.setattr(ray.train, "CheckpointConsistencyMode", SimpleNamespace(COMMITTED=0), raising=False)
    monkeypatch.setattr(torch.distributed, "barrier", lambda: None)
    return found


def write_shard(scratch: Path | None, rank: int) -> Path:
    shard = Path(tempfile.mkdtemp(prefix="mipo-ray-checkpoint-", dir=scratch))
    (shard / "state").mkdir()
    (shard / "state" / f"rank_{rank}.pt").write_bytes(b"0" * 100)
    return shard


@pytest.mark.parametrize("name", ["run", "a [b] c=d %41 #1"])
def test_a_shard_below_the_run_directory_is_renamed(
    name: str, tmp_path: Path, reported: list[ray.train.Checkpoint]
) -> None:
    """Nothing is copied: the file of the checkpoint is the one that was written."""
    stage = stage_of(str(tmp_path / name))
    scratches = [ray_worker._scratch(stage, is_first=rank == 0) for rank in (0, 1)]
    inodes = []
    for rank, scratch in enumerate(scratches):
        shard = write_shard(scratch, rank)
        inodes.append((shard / "state" / f"rank_{rank}.pt").stat().st_ino)
        ray_worker._publish(stage.run, f"{STAGE}/ray_train", shard, steps=4)
    place = tmp_path / name / STAGE / "ray_train" / "checkpoint_1" / "state"
    assert [(place / f"rank_{rank}.pt").stat().st_ino for rank in (0, 1)] == inodes
    assert {checkpoint.path for checkpoint in reported} == {str(place.parent)}


def test_elsewhere_it_goes_through_the_nodes_disk(reported: list[ray.train.Checkpoint]) -> None:
    stage = stage_of("memory://published/run")
    assert ray_worker._scratch(stage, is_first=True) is None
    shard = write_shard(None, 0)
    ray_worker._publish(stage.run, f"{STAGE}/ray_train", shard, steps=4)
    assert stage.run.list_files(f"{STAGE}/ray_train") == {"checkpoint_1/state/rank_0.pt": 100}
    assert (shard / "state" / "rank_0.pt").exists()


def test_what_killed_workers_left_is_swept_once(tmp_path: Path) -> None:
    """By the first worker, before any of them saves; never by the others."""
    stage = stage_of(str(tmp_path / "run"))
    scratch = ray_worker._scratch(stage, is_first=True)
    assert scratch is not None
    left = write_shard(scratch, 0)
    ray_worker._scratch(stage, is_first=False)
    assert left.exists()
    ray_worker._scratch(stage, is_first=True)
    assert list(scratch.iterdir()) == []
