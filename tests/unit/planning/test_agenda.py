"""What a run has still to do, and what its stages took before.

python -m pytest tests/unit/planning/test_agenda.py
"""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.planning.agenda import agenda, agenda_of, stage_key, stage_seconds
from mipo_ray.planning.earlier_runs import EarlierRuns, Measured
from mipo_ray.storage.run_directory import open_run


def test_stages_are_known_by_round_and_name() -> None:
    assert stage_key("base/evaluate") == (None, "evaluate")
    assert stage_key("rounds/000/generate") == (0, "generate")
    assert stage_key("rounds/012/judge/pairwise") == (12, "judge/pairwise")
    assert stage_key("rounds/001/tasks/gsm8k") == stage_key("rounds/001/tasks/svamp") == (1, "tasks")


def test_tasks_are_done_when_all_of_them_are() -> None:
    stages = ["base/evaluate", "base/tasks/gsm8k", "base/tasks/svamp", "rounds/000/train"]
    found = agenda(stages, ("base/evaluate", "base/tasks/gsm8k"), {})
    assert found.stages == ((None, "evaluate"), (None, "tasks"), (0, "train"))
    assert found.finished == {(None, "evaluate")}
    assert agenda(stages, stages, {}).finished == set(found.stages)


def attempt(stage: str, seconds: float | None, round_index: int | None = 0) -> list[dict[str, Any]]:
    """The events of a stage; None: it was stopped."""
    where = {"round": round_index, "stage": stage}
    end = [] if seconds is None else [{**where, "event": "stage", "stage_seconds": seconds}]
    return [{**where, "event": "stage_start"}, {**where, "event": "generated", "rows": 8}, *end]


def test_a_stage_that_was_stopped_says_nothing_of_its_time() -> None:
    """The last attempt of one took less than the whole."""
    events = [
        *attempt("evaluate", 60.0, None),
        *attempt("generate", None),
        *attempt("generate", 5.0),
        *attempt("train", 40.0),
        *attempt("train", 44.0, 1),
        {"event": "something_else"},
    ]
    assert stage_seconds(events) == {"evaluate": 60.0, "train": 44.0}


@pytest.mark.parametrize("on_gpu", [False, True])
def test_rounds_of_earlier_runs_are_spread_over_the_devices_of_now(on_gpu: bool, tmp_path: Path) -> None:
    """100 rows took 600 device seconds to generate, 200 to train once. 50 rows are planned, with two epochs."""
    measured = Measured(
        rounds=1,
        on_gpu=on_gpu,
        rows=100,
        kept=40,
        generated_tokens=1.0,
        generate_seconds=600.0,
        trained_tokens=1.0,
        train_seconds=200.0,
    )
    run = open_run(str(tmp_path))
    gpus = {"gpus_per_engine": 2.0 * on_gpu, "gpus_per_worker": 1.0 * on_gpu}
    fake_plan: Any = SimpleNamespace(
        config=load_config(None, ["train.epochs=2", "train.num_workers=4"]),
        run=run,
        resources=SimpleNamespace(on_gpu=on_gpu, **gpus),
        earlier=EarlierRuns((("elsewhere", measured),)),
        most_pairs=50,
        lifetime=SimpleNamespace(most=3),
        stages=["rounds/000/generate", "rounds/000/train"],
        finished=(),
    )
    engines = 6 if on_gpu else 3
    assert agenda_of(fake_plan).seconds == {"generate": 300.0 / engines, "train": 200.0 / 4}
    # The run's own stages count more.
    lines = [json.dumps(event) for event in attempt("train", 33.0)]
    run.write_text("metrics.jsonl", "\n".join([*lines, "{cut off"]))
    assert agenda_of(fake_plan).seconds == {"generate": 300.0 / engines, "train": 33.0}
    fake_plan.earlier = EarlierRuns()
    assert agenda_of(fake_plan).seconds == {"train": 33.0}
