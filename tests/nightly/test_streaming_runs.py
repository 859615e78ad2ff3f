"""Runs whose rounds stream: stopped and killed in each phase, they come to the policy of their pairs all the same.

python -m pytest tests/nightly/test_streaming_runs.py
"""

from __future__ import annotations

import json
import math
import shutil
import signal
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from mipo_ray.storage.run_directory import open_run
from tests.helpers.engine_processes import wait_until_nothing_is_left
from tests.helpers.runs import arguments, events, finish, kill_when, read_pairs, start, stop_when, write_prompts
from tests.helpers.streamed_training import (
    assert_equal,
    in_this_process,
    in_training_order,
    rows_of,
    streamed,
    write_conditioned,
    written_beside,
)
from tests.helpers.tiny_training import save_tied_llama

PROMPTS = 96
BATCH = 4
# One block at a time, and answers as long as the window takes: training begins long before the last block.
SLOW = (
    "model.max_model_len=512",
    "generation.sampling.max_tokens=200",
    "generation.sampling.min_tokens=200",
    "generation.pool.batches_in_flight=1",
)


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    write_prompts(directory / "train.jsonl", "train", PROMPTS)
    (directory / "recipe.yaml").write_text("{}")
    return directory


def steps(run_dir: Path) -> list[dict]:
    return [event for event in events(run_dir) if event["event"] == "train_step"]


def manifest(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / f"rounds/000/{stage}/manifest.json").read_text())


def test_a_streamed_round_is_the_same_however_often_it_is_stopped(ray_address, tiny_model, prompts, tmp_path):
    """SIGTERM while the first blocks are sampled, SIGKILL while pairs are sampled and trained on, SIGKILL when only
    training is left; the last call asks for a sequential schedule and goes on in the order that was begun."""
    run_dir = tmp_path / "run"
    generate, train = run_dir / "rounds/000/generate", run_dir / "rounds/000/train"
    options = arguments(
        run_dir,
        tiny_model,
        prompts,
        *SLOW,
        "rounds=1",
        "evaluate.enabled=false",
        f"train.batch_size={BATCH}",
        "train.checkpoint_steps=3",
    )

    def begin(schedule: str = "streaming"):
        return start(ray_address, *options, f"schedule={schedule}")

    def notes() -> int:
        return sum(".pending." not in path.name for path in (generate / "checkpoint").glob("*.parquet"))

    stop_when(begin(), signal.SIGTERM, lambda: notes() >= 1)
    wait_until_nothing_is_left()
    assert not steps(run_dir)

    kill_when(begin(), lambda: len(steps(run_dir)) >= 4)
    assert notes() < PROMPTS // 8, "sampling was over before training had begun: the test shows nothing"
    assert not (generate / "manifest.json").exists()
    wait_until_nothing_is_left()

    kill_when(begin(), lambda: (generate / "manifest.json").exists())
    assert not (train / "manifest.json").exists()
    wait_until_nothing_is_left()
    finish(begin("sequential"))

    pairs = read_pairs(run_dir, 0)
    assert sorted(pair["prompt_id"] for pair in pairs) == sorted(f"train-{row}" for row in range(PROMPTS))
    kept = sum(not pair["dropped"] for pair in pairs)
    assert (manifest(run_dir, "train")["order"], manifest(run_dir, "train")["summary"]["pairs"]) == ("prompts", kept)
    assert manifest(run_dir, "train")["summary"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
    newest = {step["step"]: step for step in steps(run_dir)}
    assert sorted(newest) == list(range(math.ceil(kept / BATCH)))

    # The same round over the same files, which are all there now.
    again = tmp_path / "again"
    shutil.copytree(run_dir, again)
    shutil.rmtree(again / "rounds/000/train")
    (again / "metrics.jsonl").unlink()
    finish(start(ray_address, *options, f"run_dir={again}", "schedule=streaming"))
    for name in ("loss", "learning_rate", "pairs"):
        assert [step[name] for step in steps(again)] == [newest[number][name] for number in sorted(newest)], name
    weights = [load_file(place / "rounds/000/train/policy/model.safetensors") for place in (run_dir, again)]
    for name, weight in weights[0].items():
        torch.testing.assert_close(weights[1][name], weight, atol=0, rtol=0, msg=name)


def test_blocks_that_come_late_and_in_any_order_train_the_policy_of_pairs_that_are_all_there(ray_cluster, tmp_path):
    """Two workers, two epochs, of which only the first waits; a worker that dies goes on at a checkpoint."""
    model_dir = save_tied_llama(tmp_path / "initial")
    rows, run = rows_of(22), open_run(str(tmp_path / "run"))
    write_conditioned(run, rows)
    options = ("train.num_workers=2", "train.epochs=2")
    with written_beside(run, rows, [2, 0, 3, 1]):
        found = streamed(model_dir, run, 7, *options)
    assert (tmp_path / "run/killed").exists()
    assert math.log(2) == pytest.approx(found.steps[0]["loss"], abs=1e-6)
    assert_equal(found, in_this_process(model_dir, tmp_path, in_training_order(rows), "train.epochs=2"), 1e-5)
