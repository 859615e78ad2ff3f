"""How much disk a run needs, against arithmetic done by hand; where it cannot fit, it is refused before it starts.

python -m pytest tests/unit/planning/test_disk.py
"""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.models.shape import EMBEDDED_SHAPE, ModelShape
from mipo_ray.planning import disk
from mipo_ray.planning.disk import Unwritten, check_disk, checkpoint_bytes, describe_disk, disk_needs
from mipo_ray.planning.plan import check_inputs, make_plan
from mipo_ray.ray_cluster.resources import Node, ResourceError
from mipo_ray.storage.run_directory import open_run

# Qwen2.5-7B: 7,615,616,512 parameters.
SEVEN_BILLION = ModelShape(7_615_616_512, 28, 3584, 18_944, 28, 4, 128, 152_064)
PARAMETERS = SEVEN_BILLION.parameters
GIB = 1024**3


def work(tmp_path: Path, *overrides: str, run_dir: str | None = None, **changes: Any) -> Unwritten:
    config = load_config(overrides=["model.dtype=bfloat16", "rounds=1", *overrides])
    run = open_run(run_dir or str(tmp_path / "run"))
    return replace(Unwritten(config, "bfloat16", pairs=320, run=run, finished=()), **changes)


@pytest.mark.parametrize(
    ("overrides", "dtype", "per_parameter"),
    [
        (["zero_stage=0"], "float32", 4 + 8),
        (["zero_stage=1"], "float32", 4 + 12),
        (["zero_stage=2"], "bfloat16", 2 + 12),
        (["zero_stage=0"], "bfloat16", 2 + 12),
        (["zero_stage=3"], "bfloat16", 12),
        (["zero_stage=3"], "float32", 12),
    ],
)
def test_bytes_of_a_checkpoint(overrides: list[str], dtype: str, per_parameter: int) -> None:
    train = load_config(overrides=[f"train.{override}" for override in overrides]).train
    assert checkpoint_bytes(SEVEN_BILLION, train, dtype) == per_parameter * PARAMETERS


def test_a_model_of_seven_billion_on_two_nodes(tmp_path: Path) -> None:
    """The figures of cluster/README.md: 85 GiB each, three of them and the policy."""
    needs = disk_needs(work(tmp_path, "train.zero_stage=3"), SEVEN_BILLION)
    assert needs.checkpoint / GIB == pytest.approx(85.1, abs=0.05)
    assert needs.policy / GIB == pytest.approx(14.2, abs=0.05)
    assert needs.run_directory == 3 * needs.checkpoint + needs.policy
    assert needs.run_directory / GIB == pytest.approx(269.5, abs=0.1)
    assert (needs.certain, needs.node) == (needs.policy, 0)


def test_what_a_node_holds_for_a_while(tmp_path: Path) -> None:
    """To go on with another number of workers, and where the run directory is no path."""
    elastic = work(tmp_path, "train.zero_stage=3", "train.num_workers=16", "train.min_workers=8")
    needs = disk_needs(elastic, SEVEN_BILLION)
    assert needs.node == 24 * PARAMETERS
    assert needs.node / GIB == pytest.approx(170.2, abs=0.1)
    remote = disk_needs(work(tmp_path, "train.zero_stage=3", run_dir="memory://run"), SEVEN_BILLION)
    assert remote.node == remote.checkpoint + remote.policy


def test_adapters_take_little(tmp_path: Path) -> None:
    train = load_config(overrides=["train.lora.rank=16", "train.zero_stage=2"]).train
    adapters = 16 * 28 * (2 * (3584 + 3584) + 2 * (3584 + 512) + 3 * (3584 + 18_944))
    assert checkpoint_bytes(SEVEN_BILLION, train, "bfloat16") == 14 * adapters + 2 * 152_064 * 3584


def test_checkpoints_by_steps_are_certain_up_to_three(tmp_path: Path) -> None:
    """320 pairs in steps of 32 are 10 steps, and after the last one there is none."""

    def certain(steps: int) -> float:
        needs = disk_needs(work(tmp_path, "train.batch_size=32", f"train.checkpoint_steps={steps}"), SEVEN_BILLION)
        return (needs.certain - needs.policy) / needs.checkpoint

    assert [certain(steps) for steps in (1, 3, 4, 9, 10)] == [3, 3, 2, 1, 0]


def test_what_is_there_is_not_counted_again(tmp_path: Path) -> None:
    there = work(tmp_path, "rounds=3", "train.checkpoint_steps=1", finished=("rounds/000/train",))
    (tmp_path / "run/rounds/001/train/ray_train/checkpoint_1").mkdir(parents=True)
    (tmp_path / "run/rounds/001/train/ray_train/checkpoint_1/shard.pt").write_bytes(b"0" * 1000)
    needs = disk_needs(there, EMBEDDED_SHAPE)
    assert needs.policies == 2
    assert needs.run_directory == needs.certain == 3 * needs.checkpoint - 1000 + 2 * needs.policy
    finished = replace(there, finished=tuple(f"rounds/00{number}/train" for number in range(3)))
    assert disk_needs(finished, EMBEDDED_SHAPE).run_directory == 0
    assert describe_disk(finished) == []


def with_free(monkeypatch: pytest.MonkeyPatch, free: float) -> None:
    monkeypatch.setattr(disk.shutil, "disk_usage", lambda _: SimpleNamespace(free=int(free)))


def test_a_run_that_cannot_fit_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By the plan, before anything starts; one that may fit is told of."""
    config = load_config(
        overrides=[
            *(f"run_dir={tmp_path}/run", "model.path=embedded", "prompts.path=bundled:instructions", "rounds=4"),
            *("conditioning.strategy=random_prompt", "evaluate.enabled=false", "model.dtype=float32"),
        ]
    )
    inputs = check_inputs(config, open_run(config.run_dir))
    nodes = [Node({"CPU": 6.0})]
    policy = 4 * EMBEDDED_SHAPE.parameters
    with_free(monkeypatch, 4 * policy - 1)
    with pytest.raises(ResourceError, match=r"run: expected at least 2\.0 GiB of free space \(4 policies of 513 MiB.*"):
        make_plan(inputs, nodes)
    with_free(monkeypatch, 4 * policy)
    first, second = describe_disk(make_plan(inputs, nodes).unwritten("float32"))
    assert first == (
        "disk            run directory: up to 8.0 GiB more (3 checkpoints of 2.0 GiB while a round trains, 4 policies "
        "of 513 MiB); 2.0 GiB are free"
    )
    assert second.startswith("disk            not enough for every checkpoint")


def test_of_an_object_store_it_is_only_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with_free(monkeypatch, 0)
    remote = work(tmp_path, "model.path=embedded", run_dir="memory://run")
    check_disk(remote)
    lines = describe_disk(remote)
    assert lines[0].endswith("how much is free there is not known")
    assert "each training node: up to" in lines[1]


def test_the_directory_that_ray_train_keeps_is_the_one_that_is_counted() -> None:
    from mipo_ray.training import ray_worker, trainer

    assert ray_worker.CHECKPOINTS == "ray_train"
    assert trainer._CHECKPOINTS_KEPT + 1 == disk.MOST_CHECKPOINTS
