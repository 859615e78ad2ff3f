"""Runs in which evaluation overlaps the next round's generation: what they come to, and that they go on after a kill.

python -m pytest tests/nightly/test_overlapping_runs.py
"""

from __future__ import annotations

import json
import math
import re
import shutil
import signal
from pathlib import Path

import pytest

from tests.helpers.engine_processes import wait_until_nothing_is_left
from tests.helpers.runs import (
    arguments,
    events,
    finish,
    kill_when,
    read_directory,
    read_pairs,
    start,
    stop_when,
    wait_until,
    write_prompts,
)

PROMPTS, HELD_OUT = 64, 6
STAGES = ("base/evaluate", *(f"rounds/00{r}/{name}" for r in (0, 1) for name in ("generate", "train", "evaluate")))
OVERLAPPING = ("evaluate.schedule=overlapping", "generation.pool.lifetime=run")
# What was asked and not what was answered: tokens depend, in the last digits, on what is sampled beside them.
CONDITIONING = ("pair_id", "prompt_id", "sample", "round", "strategy", "mismatched_prompt_id", "prompt_token_ids")


@pytest.fixture(scope="module")
def prompts(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("prompts")
    write_prompts(directory / "train.jsonl", "train", PROMPTS)
    write_prompts(directory / "held_out.jsonl", "held-out", HELD_OUT)
    (directory / "recipe.yaml").write_text("{}")
    return directory


def options(run_dir: Path, model: Path, prompts: Path, *more: str) -> list[str]:
    """Slow enough for both sides of a round to be at work at once."""
    slow = (
        "generation.sampling.max_tokens=64",
        "generation.sampling.min_tokens=64",
        "generation.pool.batches_in_flight=1",
    )
    return arguments(run_dir, model, prompts, *slow, "train.batch_size=16", *more)


def of_stage(run_dir: Path, index: int | None, stage: str, kind: str) -> list[float]:
    """When the events of a kind were sent."""
    found = [event for event in events(run_dir) if event["event"] == kind]
    return [event["time"] for event in found if (event["round"], event["stage"]) == (index, stage)]


def manifest(run_dir: Path, stage: str) -> dict:
    return json.loads((run_dir / stage / "manifest.json").read_text())


def conditioning(run_dir: Path, index: int) -> list[tuple]:
    return sorted(tuple(map(str, (pair[name] for name in CONDITIONING))) for pair in read_pairs(run_dir, index))


def check_overlap(run_dir: Path) -> None:
    """Both stages were under way at once, and training began after both."""
    for index, before in ((0, None), (1, 0)):
        (measured,), (generated,) = (
            of_stage(run_dir, number, stage, "stage_start")
            for number, stage in ((before, "evaluate"), (index, "generate"))
        )
        ends = of_stage(run_dir, before, "evaluate", "stage") + of_stage(run_dir, index, "generate", "stage")
        assert max(measured, generated) < min(ends)
        assert of_stage(run_dir, index, "train", "stage_start")[0] > max(ends)


def test_a_run_that_overlaps_does_what_a_sequential_one_does(ray_address, tiny_model, prompts, tmp_path):
    """Equal in both: the stages, the base's held-out prompts, every round's conditioning, seeds' pair ids, the policy
    that each was sampled from, the number of steps and the first loss, and which measures there are. The answers
    themselves may differ where rounding decides between two tokens."""
    overlapping, sequential = tmp_path / "overlapping", tmp_path / "sequential"
    output = finish(start(ray_address, *options(overlapping, tiny_model, prompts, *OVERLAPPING)))
    assert "evaluation      overlapping (evaluate.schedule)" in output
    check_overlap(overlapping)
    # One engine for both sides and for all policies: each took the next one's weights once, when both had ended.
    assert sum(event["event"] == "engine_start" for event in events(overlapping)) == 1
    assert sum(event["event"] == "weight_swap" for event in events(overlapping)) == 2
    assert not [event for event in events(overlapping) if event["event"] == "weight_swap_failure"]

    again = finish(start(ray_address, *options(overlapping, tiny_model, prompts, "evaluate.schedule=sequential")))
    assert "finished before, nothing to do" in again

    output = finish(start(ray_address, *options(sequential, tiny_model, prompts, "evaluate.schedule=sequential")))
    assert "evaluation      sequential (evaluate.schedule)" in output
    for index in (0, 1):
        assert conditioning(overlapping, index) == conditioning(sequential, index)
    for stage in STAGES:
        one, other = manifest(overlapping, stage), manifest(sequential, stage)
        assert one["config_hash"] == other["config_hash"]
        if stage.endswith("train"):
            assert one["summary"]["steps"] > 0
            assert one["summary"]["first_loss"] == pytest.approx(math.log(2), abs=1e-4)
            assert one["order"] == other["order"] == "pair_id"
        elif stage.endswith("generate"):
            assert one["statistics"]["rows"] == other["statistics"]["rows"] == PROMPTS
            assert one["policy"].removeprefix(str(overlapping)) == other["policy"].removeprefix(str(sequential))
        else:
            assert one["responses"] == other["responses"]
            assert one["results"].keys() == other["results"].keys()
    held_out = [read_directory(run / "base/evaluate/prompts") for run in (overlapping, sequential)]
    assert held_out[0] == held_out[1]
    results = [json.loads((run / "results.json").read_text()) for run in (overlapping, sequential)]
    assert results[0].keys() == results[1].keys() == {"base", "0", "1"}
    assert (overlapping / "report.html").exists()


def test_a_run_that_is_killed_and_stopped_while_both_sides_work_goes_on(ray_address, tiny_model, prompts, tmp_path):
    """SIGKILL in the base's evaluation, SIGTERM in the next one; the last call is sequential and finds what is left."""
    run_dir = tmp_path / "run"

    def begin(*more: str):
        return start(ray_address, *options(run_dir, tiny_model, prompts, *more))

    def both_work(before: str, index: int) -> bool:
        """Answers are sampled or scored, and pairs sampled, of which neither is finished."""
        evaluate, generate = run_dir / before / "evaluate", run_dir / f"rounds/00{index}/generate"
        begun = (evaluate / "responses").exists() and (generate / "conditioned.json").exists()
        return begun and not any((stage / "manifest.json").exists() for stage in (evaluate, generate))

    kill_when(begin(*OVERLAPPING), lambda: both_work("base", 0))
    wait_until_nothing_is_left()
    stop_when(begin(*OVERLAPPING), signal.SIGTERM, lambda: both_work("rounds/000", 1))
    wait_until_nothing_is_left()
    assert not (run_dir / "rounds/001/train").exists()
    finish(begin("evaluate.schedule=sequential"))

    for index in (0, 1):
        found = [pair["prompt_id"] for pair in read_pairs(run_dir, index)]
        assert sorted(found) == sorted(f"train-{row}" for row in range(PROMPTS))
    for stage in STAGES:
        manifest(run_dir, stage)
    assert json.loads((run_dir / "results.json").read_text()).keys() == {"base", "0", "1"}


def test_an_evaluation_that_fails_stops_generation_with_its_own_error(ray_address, tiny_model, prompts, tmp_path):
    """Round 0's evaluation scores the base's responses again, which are gone; with them back the run goes on."""
    run_dir = tmp_path / "run"
    responses, hidden = run_dir / "base/evaluate/responses", tmp_path / "hidden"
    following = run_dir / "rounds/001"

    process = start(ray_address, *options(run_dir, tiny_model, prompts, *OVERLAPPING))
    wait_until(process, lambda: (run_dir / "rounds/000/train/pairs.txt").exists())  # the base is measured by then
    shutil.move(responses, hidden)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1, output
    assert re.search(r"^FileNotFoundError: .*base/evaluate/responses", output, re.MULTILINE), output
    assert "StoppedBeside" not in output
    assert not (run_dir / "rounds/000/evaluate/manifest.json").exists()
    assert (following / "generate/conditioned.json").exists()
    assert not (following / "generate/manifest.json").exists()
    assert not (following / "train").exists()
    wait_until_nothing_is_left()

    shutil.move(hidden, responses)
    finish(start(ray_address, *options(run_dir, tiny_model, prompts, *OVERLAPPING)))
    assert json.loads((run_dir / "results.json").read_text()).keys() == {"base", "0", "1"}
