"""A training that failed is gone on with by the same call, with the workers that fit then.

A worker that dies inside a call: tests/integration/test_training_ray.py.

python -m pytest tests/nightly/test_training_resumed.py
"""

from __future__ import annotations

import shutil

import pytest

from mipo_ray.errors import UserError
from mipo_ray.monitoring import events as monitoring
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.ray_training import (
    KILLED_STEP,
    PAIRS,
    STAGE,
    STEPS_WITH_A_KILL,
    assert_equal_outcomes,
    in_this_process,
    on_ray,
    steps_done,
)
from tests.helpers.tiny_training import KillsItsWorker, save_tied_llama


def test_the_same_call_goes_on_after_a_failure_with_the_workers_that_fit_then(ray_cluster, tmp_path):
    model_dir, run = save_tied_llama(tmp_path / "initial"), open_run(str(tmp_path / "run"))
    events = KillsItsWorker(monitoring.start(run), KILLED_STEP, tmp_path / "killed")
    with pytest.raises(RuntimeError, match="training worker"):
        on_ray(model_dir, run, events)
    assert [step["step"] for step in steps_done(run, events)] == STEPS_WITH_A_KILL[:5]
    # A checkpoint of another ZeRO stage is refused once, and not tried again by restarts, which would meet it again.
    with pytest.raises(UserError, match="ZeRO stage 2 in float32, and training now runs with ZeRO stage 1 in float32"):
        on_ray(model_dir, run, events, zero_stage=1, max_failures=3)
    assert [step["step"] for step in steps_done(run, events)] == STEPS_WITH_A_KILL[:5]
    # Of two workers with 4 CPUs each, one fits into the cluster's 6: it takes over the shards of both.
    outcome = on_ray(model_dir, run, events, min_workers=1, cpus_per_worker=4)
    assert [step["step"] for step in outcome.steps] == STEPS_WITH_A_KILL
    assert_equal_outcomes(outcome, in_this_process(model_dir, tmp_path, PAIRS), tolerance=1e-5)


def warnings(run: RunDirectory) -> list[str]:
    return [event["text"] for event in monitoring.read_events(run) if event["event"] == "warning"]


def test_a_checkpoint_that_is_damaged_costs_the_steps_since_the_one_before(ray_cluster, tmp_path):
    model_dir, run = save_tied_llama(tmp_path / "initial"), open_run(str(tmp_path / "run"))
    events = KillsItsWorker(monitoring.start(run), KILLED_STEP, tmp_path / "killed")
    with pytest.raises(RuntimeError, match="training worker"):
        on_ray(model_dir, run, events)
    books = tmp_path / "run" / STAGE / "ray_train"
    older, newest = sorted(books.glob("checkpoint_*/"))
    shard = next(newest.rglob("*optim_states.pt"))
    shard.write_bytes(shard.read_bytes()[:-1000])
    outcome = on_ray(model_dir, run, events)
    assert [step["step"] for step in outcome.steps] == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert_equal_outcomes(outcome, in_this_process(model_dir, tmp_path, PAIRS), tolerance=1e-5)
    (text,) = warnings(run)
    assert f"training goes on from {older.name}, since {newest.name}: " in text


def test_a_checkpoint_that_is_gone_costs_the_steps_since_the_one_before(ray_cluster, tmp_path):
    """Ray Train would not start with a list that names it."""
    model_dir, run = save_tied_llama(tmp_path / "initial"), open_run(str(tmp_path / "run"))
    events = KillsItsWorker(monitoring.start(run), KILLED_STEP, tmp_path / "killed")
    with pytest.raises(RuntimeError, match="training worker"):
        on_ray(model_dir, run, events)
    newest = max((tmp_path / "run" / STAGE / "ray_train").glob("checkpoint_*/"))
    shutil.rmtree(newest)
    outcome = on_ray(model_dir, run, events)
    assert [step["step"] for step in outcome.steps] == [0, 1, 2, 3, 4, 2, 3, 4, 5]
    assert_equal_outcomes(outcome, in_this_process(model_dir, tmp_path, PAIRS), tolerance=1e-5)
    (text,) = warnings(run)
    assert f"Ray Train's list of checkpoints names {newest.name}, which is gone" in text


def test_without_a_whole_checkpoint_training_starts_from_its_beginning(ray_cluster, tmp_path):
    model_dir, run = save_tied_llama(tmp_path / "initial"), open_run(str(tmp_path / "run"))
    events = KillsItsWorker(monitoring.start(run), KILLED_STEP, tmp_path / "killed")
    with pytest.raises(RuntimeError, match="training worker"):
        on_ray(model_dir, run, events)
    books = tmp_path / "run" / STAGE / "ray_train"
    for progress in books.glob("checkpoint_*/progress.json"):
        progress.unlink()
    outcome = on_ray(model_dir, run, events)
    assert [step["step"] for step in outcome.steps] == [0, 1, 2, 3, 4, 0, 1, 2, 3, 4, 5]
    assert_equal_outcomes(outcome, in_this_process(model_dir, tmp_path, PAIRS), tolerance=1e-5)
    (text,) = warnings(run)
    assert f"training starts from the beginning of the round, since no checkpoint in {books} is as it was" in text
