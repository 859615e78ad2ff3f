"""A run that the guard stops, and that goes on from its last good policy, over real engines and training.

python -m pytest tests/nightly/test_guarded_runs.py
"""

from __future__ import annotations

import html
import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from mipo_ray import run
from mipo_ray.config.guard import DEFAULT_BOUNDS
from tests.helpers.runs import arguments, events, finish, joined_cluster, read_directory, snapshot, start, write_prompts

DEFAULTS = ", ".join(f"{name}: null" for name in DEFAULT_BOUNDS)
NO_BOUND = f"guard.bounds={{{DEFAULTS}}}"
# The base's margin is 0, and that of whatever was trained is not.
ANY_ROUND_BREAKS = f"guard.bounds={{{DEFAULTS}, reward_margin: {{max_rise: 0, max_fall: 0}}}}"
# Lengths, of which none is better, take the place of the primary measure, whose bound noise could break.
OPTIONS = ("evaluate.primary=response_tokens", "generation.pool.lifetime=run")
LEARNING_RATE = 1e-3  # of `arguments`


def manifest(run_dir: Path, stage: str) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run_dir / stage / "manifest.json").read_text())
    return found


@pytest.fixture(scope="module")
def options(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    directory = tmp_path_factory.mktemp("guarded")
    write_prompts(directory / "train.jsonl", "train", 16)
    write_prompts(directory / "held_out.jsonl", "held-out", 6)
    (directory / "recipe.yaml").write_text("{}")
    return arguments(directory / "run", tiny_model, directory, *OPTIONS)


@pytest.fixture(scope="module")
def run_dir(options: list[str]) -> Path:
    (place,) = [Path(option.removeprefix("run_dir=")) for option in options if option.startswith("run_dir=")]
    return place


@pytest.fixture(scope="module")
def stopped(options: list[str], run_dir: Path, ray_address: str) -> str:
    """What a run of two rounds said whose first one is bad."""
    return finish(start(ray_address, *options, "rounds=2", "guard.when_bad=stop", ANY_ROUND_BREAKS))


def test_a_bad_round_stops_the_run_which_then_is_finished(
    stopped: str, options: list[str], run_dir: Path, ray_address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    # The first round's policy is there with its answers, and the second round never began.
    assert (run_dir / "rounds/000/train/policy/model.safetensors").exists()
    assert read_directory(run_dir / "rounds/000/evaluate/responses")
    assert not (run_dir / "rounds/001").exists()
    (one,) = manifest(run_dir, "rounds/000/guard")["broken"]
    margin = json.loads((run_dir / "results.json").read_text())["0"]["reward_margin"]["value"]
    assert margin != 0
    assert (one["measure"], one["value"], one["bound"], one["against"]) == ("reward_margin", margin, 0.0, "base")

    cause = f"nats, expected {one['side']} 0 (the base has 0)"
    assert "round 0  guard     bad, not promoted: " in stopped
    assert cause in stopped
    assert "the run's policy is the initial model" in stopped
    assert ", stopped by the guard after round 0; results and report: " in stopped.splitlines()[-1]
    report = html.unescape((run_dir / "report.html").read_text())
    assert "The guard found round 0 bad: " in report
    assert cause in report
    (event,) = [event for event in events(run_dir) if event["event"] == "guard"]
    assert (event["round"], event["broken_bounds"]) == (0, 1)

    before = snapshot(run_dir)
    again = [*options, f"ray.address={ray_address}", "rounds=2", "guard.when_bad=stop", ANY_ROUND_BREAKS, "--json"]
    with joined_cluster():
        assert run.main(again) == 0
    end = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end["text"].endswith("finished before, nothing to do")
    assert (end["policy"], list(end["bad_rounds"])) == ("base", ["0"])
    assert snapshot(run_dir) == before


def test_the_run_goes_on_from_the_last_good_policy_at_half_the_rate(
    stopped: str, options: list[str], run_dir: Path, ray_address: str
) -> None:
    """Round 0 is judged anew, by no bound at all, and is good. Round 1 is bad: for round 2 the engine, which lives and
    held round 1's policy, takes round 0's weights again and proves them."""
    shutil.rmtree(run_dir / "rounds/000/guard")
    output = finish(start(ray_address, *options, "rounds=1", "guard.when_bad=stop", NO_BOUND))
    assert "round 0  guard     good: keeps all 0 bounds\n" in output
    count = len(events(run_dir))

    halve = "guard.when_bad=halve_learning_rate"
    output = finish(start(ray_address, *options, "rounds=3", halve, ANY_ROUND_BREAKS))
    good = str(run_dir / "rounds/000/train/policy")
    assert [manifest(run_dir, f"rounds/00{number}/generate")["policy"] for number in (1, 2)] == [good, good]
    assert manifest(run_dir, "rounds/002/train")["reference"] == good
    assert manifest(run_dir, "rounds/002/train")["summary"]["first_loss"] == pytest.approx(0.6931, abs=1e-4)
    rates = [manifest(run_dir, f"rounds/00{number}/train")["learning_rate"] for number in range(3)]
    assert rates == [LEARNING_RATE, LEARNING_RATE, LEARNING_RATE / 2]
    found = events(run_dir)[count:]
    peaks = [
        max(event["learning_rate"] for event in found if event["event"] == "train_step" and event["round"] == number)
        for number in (1, 2)
    ]
    assert peaks == pytest.approx(rates[1:])
    swaps = [(event["round"], event["stage"]) for event in found if event["event"] == "weight_swap"]
    assert swaps == [(1, "evaluate"), (2, "generate"), (2, "evaluate")]
    assert sum(event["event"] == "engine_start" for event in found) == 1
    assert "round 1  guard     bad, not promoted: " in output
    assert "round 2  guard     bad, not promoted: " in output
    assert "the run's policy is that of round 0" in output
