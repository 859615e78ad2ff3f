"""Tests of the night: the real model's runs, and what needs programs or clusters of its own."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.helpers.real_tasks import (
    ARC_ITEMS,
    GSM8K_ITEMS,
    GSM8K_TOKENS,
    REAL_TASKS_SECONDS,
    SVAMP_ITEMS,
    SVAMP_TOKENS,
)
from tests.helpers.runs import finish, start_evaluation


@pytest.fixture(scope="session", autouse=True)
def environment(test_environment: None) -> None:
    """Every test here, and every process that it starts, has an environment of its own."""


@pytest.fixture(scope="session")
def real_tasks(ray_address: str, shared_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run directory in which the real 135M model is measured on three tasks at once; tests must not change it.

    Responses are kept short for a CPU.
    """
    directory = tmp_path_factory.mktemp("real-tasks")
    tasks = {
        "arc_easy_likelihood": {"path": f"{shared_data}/arc/arc_easy_test.jsonl", "limit": ARC_ITEMS},
        "svamp": {"path": f"{shared_data}/svamp/SVAMP.json", "limit": SVAMP_ITEMS, "max_tokens": SVAMP_TOKENS},
        "gsm8k": {"path": f"{shared_data}/gsm8k/test.jsonl", "limit": GSM8K_ITEMS, "max_tokens": GSM8K_TOKENS},
    }
    (directory / "recipe.yaml").write_text(f"run_dir: {directory}/run\nmodel: {{max_model_len: 2048}}\n")
    process = start_evaluation(ray_address, f"{directory}/recipe.yaml", f"tasks={json.dumps(tasks)}")
    print(finish(process, seconds=REAL_TASKS_SECONDS))
    return directory / "run"
