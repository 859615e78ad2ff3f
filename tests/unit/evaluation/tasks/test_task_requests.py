"""What an engine is asked about the items of a task, and whether it fits the window.

python -m pytest tests/unit/evaluation/tasks/test_task_requests.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet
import pytest

from mipo_ray.config.recipe import load_config
from mipo_ray.config.schema import Config
from mipo_ray.evaluation.tasks.task_check import CheckedTask, check_tasks
from mipo_ray.evaluation.tasks.task_requests import ITEM_SCHEMA, ITEMS, item_rows, prepare_tasks, requests_of
from mipo_ray.generation.rendering import PromptTooLongError
from mipo_ray.storage.records import to_text
from mipo_ray.storage.run_directory import RunDirectory
from tests.helpers.tiny_model import make_tiny_model

LIMIT = 12


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny_model(tmp_path_factory.mktemp("models") / "tiny"))


def settings(data: Path, window: int, model: str = "embedded") -> Config:
    tasks = {
        "gsm8k_zero_shot": {"path": f"{data}/sums.json", "max_tokens": LIMIT},
        "arc_easy_likelihood": {"path": f"{data}/choices.json"},
    }
    window_and_model = [f"evaluate.task_max_model_len={window}", f"model.path={model}"]
    return load_config(overrides=[f"evaluate.tasks={json.dumps(tasks)}", *window_and_model])


def prepare(task: CheckedTask, config: Config, run: RunDirectory) -> pa.Table:
    """What `prepare_tasks` leaves of a task, written without Ray; returns the requests."""
    block = pa.Table.from_pylist(list(item_rows(task)), schema=ITEM_SCHEMA)
    requests = requests_of(block, task=task, config=config)
    run.write_text(f"{ITEMS}/{task.name}/definition.json", to_text(task.definition))
    directory = Path(run.path(ITEMS, task.name, "requests"))
    directory.mkdir()
    pyarrow.parquet.write_table(requests, directory / "part-0.parquet")
    return requests


@pytest.mark.parametrize("name", ["gsm8k_zero_shot", "arc_easy_likelihood"])
def test_requests_of_a_larger_window_are_measured_again_before_a_smaller_one(
    name: str, tmp_path: Path, model: str
) -> None:
    sums = [{"question": "word " * count, "answer": "#### 1"} for count in (3, 40, 5)]
    (tmp_path / "sums.json").write_text(json.dumps(sums))
    choices = [
        {"id": f"c{count}", "question": "word " * count, "choices": ["a", "tea " * 9], "answerKey": "A"}
        for count in (3, 40, 5)
    ]
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    run = RunDirectory(str(tmp_path / "run"))
    (task,) = [task for task in check_tasks(settings(tmp_path, 2048)) if task.name == name]
    rows = prepare(task, settings(tmp_path, 2048, model), run).to_pylist()
    longest = rows[1]
    asked = [len(request["prompt_token_ids"]) + LIMIT for request in longest["requests"]]
    # One token more than context and option: the engine scores while it generates.
    asked += [len(each["prompt_token_ids"]) + len(each["response_token_ids"]) + 1 for each in longest["scored"]]
    needed = max(asked)
    assert needed > 50
    prepare_tasks(settings(tmp_path, needed, model), run, [task])
    with pytest.raises(PromptTooLongError) as caught:
        prepare_tasks(settings(tmp_path, needed - 1, model), run, [task])
    assert str(caught.value).startswith(f"prompt '{name}/{longest['item_id']}': ")
    assert f"evaluate.task_max_model_len {needed - 1} - max_tokens" in str(caught.value)
