"""Training on pairs that are still being generated: in the order of the prompts, whenever their blocks are written.

With a worker that dies, and two epochs: tests/nightly/test_streaming_runs.py.

python -m pytest tests/integration/test_streamed_training.py
"""

from __future__ import annotations

import threading
import time
from concurrent.futures import Future
from pathlib import Path
from typing import Any

import pytest
import ray
import ray.data

from mipo_ray.config.recipe import load_config
from mipo_ray.monitoring.events import recording
from mipo_ray.ray_cluster.beside import StoppedBeside, work_beside
from mipo_ray.session import Session
from mipo_ray.storage.rounds import Round
from mipo_ray.storage.run_directory import open_run
from mipo_ray.training.stream import PairStream
from mipo_ray.training.trainer import ArrivingPairs, Models, train_policy
from tests.helpers.streamed_training import (
    GENERATE,
    ON_CPU,
    TRAIN,
    TRAIN_STAGE,
    assert_equal,
    rows_of,
    streamed,
    write_block,
    write_conditioned,
    written_beside,
)
from tests.helpers.tiny_training import save_tied_llama

pytestmark = pytest.mark.usefixtures("ray_cluster")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tied_llama(tmp_path_factory.mktemp("model") / "initial")


def test_what_filters_drop_changes_the_learning_rate_by_the_pairs_alone(model_dir, tmp_path):
    """By what was read until then: the same rates, and weights, of blocks that came one by one and that were there."""
    rows = rows_of(24, dropped=[0, 1, 7, 12, 13, 14, 15, 16, 17, 20])
    outcomes = []
    for name, order in (("arriving", [1, 0, 3, 2]), ("there", [])):
        run = open_run(str(tmp_path / name))
        write_conditioned(run, rows)
        for number in range(4):
            if number not in order:
                write_block(run, rows, number)
        with written_beside(run, rows, order):
            outcomes.append(streamed(model_dir, run, None, "train.num_workers=2"))
    arriving, there = outcomes
    # Kept are 4 of 6 rows, 9 of 12, 9 of 18 and 14 of 24: with the first block 16 pairs are expected, with the second
    # 18, and the third gives no step.
    assert [step["total_steps"] for step in arriving.steps] == [4, 5, 4, 4]
    assert (arriving.summary.steps, arriving.summary.pairs) == (4, 14)
    assert_equal(arriving, there, tolerance=0.0)


def test_a_generation_that_fails_ends_the_training_that_waits_for_it(model_dir, tmp_path):
    run, rows = open_run(str(tmp_path / "run")), rows_of(12)
    write_conditioned(run, rows)
    write_block(run, rows, 0)
    stage = Session(load_config(None, TRAIN), run, ON_CPU, None).stage(Round(0), "train")
    with recording(run) as events, pytest.raises(RuntimeError, match="no engine is left"):
        train_policy(
            Session(stage.config, run, ON_CPU, events).stage(Round(0), "train"),
            Models(str(model_dir), str(model_dir)),
            ArrivingPairs(PairStream(run, GENERATE, 1), failure=lambda: RuntimeError("no engine is left")),
        )
    assert not (tmp_path / "run" / TRAIN_STAGE / "policy/config.json").exists()


def slow(batch: dict[str, Any]) -> dict[str, Any]:
    time.sleep(0.2)
    return batch


def test_an_execution_beside_ends_with_the_block_that_fails_and_tells_its_own_error():
    begun = threading.Event()

    def endless() -> None:
        for _ in ray.data.range(100_000, override_num_blocks=1000).map_batches(slow).iter_batches():
            begun.set()

    def fail_beside() -> None:
        with work_beside(endless, "endless") as done:
            ended.append(done)
            assert begun.wait(60)
            raise KeyError("of the block")

    ended: list[Future[None]] = []
    with pytest.raises(KeyError, match="of the block"):
        fail_beside()
    assert isinstance(ended[0].exception(), StoppedBeside)

    def fails() -> None:
        raise ValueError("of the work")

    with pytest.raises(ValueError, match="of the work"), work_beside(fails, "fails"):
        pass
    with work_beside(lambda: ray.data.range(3).count(), "count") as counted:
        pass
    assert counted.result() == 3
