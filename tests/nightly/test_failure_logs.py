"""A run that fails in an engine or in a training worker leaves the reason in its run directory, by Ray's own logs.

python -m pytest tests/nightly/test_failure_logs.py
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.helpers.runs import arguments, run_command, write_prompts

# What breaks, of whom, and what its own process says of it.
FAILURES = {
    "engine": (
        ["generation.pool.engine_args={worker_extension_cls: nowhere.Nothing}"],
        ("Sampler-", "LivingEngine-"),
        "No module named 'nowhere'",
    ),
    "worker": (
        ["train.deepspeed={optimizer: {type: NoSuchOptimizer}}", "train.max_failures=0"],  # which DeepSpeed reads
        ("RayTrainWorker-",),
        "NoSuchOptimizer",
    ),
}


@pytest.mark.parametrize("place", FAILURES)
def test_the_reason_of_a_failure_stays_in_the_run_directory(
    place: str, tiny_model: Path, ray_address: str, tmp_path: Path
) -> None:
    overrides, writers, reason = FAILURES[place]
    write_prompts(tmp_path / "train.jsonl", "train", 24)
    write_prompts(tmp_path / "held_out.jsonl", "held-out", 6)
    (tmp_path / "recipe.yaml").write_text("{}")
    options = arguments(tmp_path / "run", tiny_model, tmp_path, "evaluate.enabled=false", *overrides)
    code, output = run_command(ray_address, *options, environment={"WANDB_API_KEY": "f0e1d2c3b4a5968778695a4b"})
    assert code == 1, output

    (failure,) = [place for place in (tmp_path / "run" / "logs").iterdir() if place.name != "libraries"]
    assert "the last lines that libraries printed (all of them: " in output
    assert f"the last lines of engines, workers and this driver: {failure}\n" in output
    files = {file.name: file.read_text() for file in failure.iterdir()}
    assert "Traceback" in files["driver.txt"]
    said = {name for name, text in files.items() if reason in text and name.startswith(writers)}
    assert said, files
    assert not any("f0e1d2c3b4a5" in text for text in files.values())
    assert "missing.txt" not in files, files["missing.txt"]
