"""The tasks of a configuration, checked against their data and against what a run directory holds.

python -m pytest tests/unit/evaluation/tasks/test_task_check.py
"""

from __future__ import annotations

import json
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from mipo_ray.config.recipe import ConfigError, load_config
from mipo_ray.config.schema import Config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.figures import final_tables
from mipo_ray.evaluation.tasks.task import TASKS_DIRECTORY
from mipo_ray.evaluation.tasks.task_check import check_finished_tasks, check_tasks, differences
from mipo_ray.storage.entries import Evaluated
from mipo_ray.storage.manifests import TaskDefinition
from mipo_ray.storage.records import read_record, to_json, to_text
from mipo_ray.storage.results import read_evaluation, write_evaluation
from mipo_ray.storage.rounds import BASE, Round
from mipo_ray.storage.run_directory import RunDirectory
from mipo_ray.text.final_answers import RULES
from tests.helpers.stages import commit, edit_manifest
from tests.helpers.task_entries import CHANGE, ENTRY


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Ten word problems and, beside them, ten questions with options."""
    sums = [{"question": f"What is {i} + 1?", "answer": f"#### {i + 1}"} for i in range(10)]
    (tmp_path / "sums.json").write_text(json.dumps(sums))
    options = {"choices": ["one", "two", "three"], "labels": ["1", "2", "3"]}
    choices = [
        {"id": f"c{i}", "question": f"Number {i % 3 + 1}?", "answerKey": str(i % 3 + 1), **options} for i in range(9)
    ]
    (tmp_path / "choices.json").write_text(json.dumps(choices))
    return tmp_path


def config(tasks: dict[str, Any] | list[str], *overrides: str) -> Config:
    return load_config(overrides=[f"evaluate.tasks={json.dumps(tasks)}", "model.max_model_len=2048", *overrides])


def both(data: Path, **changes: Any) -> Config:
    return config(
        {
            "gsm8k": {"path": f"{data}/sums.json", **changes},
            "arc_easy_likelihood": {"path": f"{data}/choices.json", "limit": 6},
        }
    )


def test_a_task_may_be_a_name_a_list_or_a_mapping() -> None:
    assert list(load_config(overrides=["evaluate.tasks=svamp"]).evaluate.tasks) == ["svamp"]
    assert list(load_config(overrides=["evaluate.tasks=[svamp, gsm8k]"]).evaluate.tasks) == ["svamp", "gsm8k"]
    settings = load_config(overrides=["evaluate.tasks={svamp: , gsm8k: {limit: 3}}"]).evaluate.tasks
    assert (settings["svamp"].limit, settings["gsm8k"].limit) == (None, 3)
    one = load_config(overrides=["evaluate.tasks.svamp.path=x.json", "evaluate.tasks.svamp.max_tokens=9"])
    assert (one.evaluate.tasks["svamp"].path, one.evaluate.tasks["svamp"].max_tokens) == ("x.json", 9)
    with pytest.raises(ConfigError, match="expected each task once, found svamp several times"):
        load_config(overrides=["evaluate.tasks=[svamp, svamp]"])


@pytest.mark.parametrize("entry", ["gsm8k: {limit: 100}", "7"])
def test_a_list_of_tasks_holds_names_alone(tmp_path: Path, entry: str) -> None:
    (tmp_path / "recipe.yaml").write_text(f"evaluate:\n  tasks:\n    - svamp\n    - {entry}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(tmp_path / "recipe.yaml")
    found = "{'gsm8k': {'limit': 100}}" if entry.startswith("gsm8k") else "7"
    expected = "expected task names, or a mapping of names to {path, limit, max_tokens}; found " + found
    assert f"evaluate.tasks: {expected}" in str(caught.value)


def test_items_are_counted_and_their_definition_says_what_was_measured(data: Path) -> None:
    sums, choices = check_tasks(both(data, max_tokens=64))
    assert (sums.items, choices.items) == (10, 6)
    assert (sums.definition.sampling or {})["max_tokens"] == 64
    assert choices.definition.sampling is None
    assert [item.answer for item in choices.read()] == ["1", "2", "3"] * 2
    assert differences(sums.definition, sums.definition) == []
    assert read_record(TaskDefinition, to_text(sums.definition), "") == sums.definition
    # "Question: Number 1?\nAnswer:" before each of three options.
    context = len("Question: Number 1?\nAnswer:")
    assert choices.characters == 6 * (3 * context + len("onetwothree"))


@pytest.mark.parametrize(
    ("tasks", "expected"),
    [
        ({"gsm9k": {}}, "evaluate.tasks: no task 'gsm9k'; did you mean 'gsm8k'?"),
        ({"gsm8k": {"path": "{data}/none.json"}}, "evaluate.tasks.gsm8k.path: no file matches"),
        ({"svamp": {"path": "{data}/sums.json"}}, "sums.json, row 1: no column 'Body', which question_template uses"),
        (
            {"gsm8k": {"path": "{data}/sums.json", "max_tokens": 2048}},
            "leave no room for a prompt in the window of",
        ),
        (
            {"arc_easy_likelihood": {"path": "{data}/choices.json", "max_tokens": 5}},
            "evaluate.tasks.arc_easy_likelihood.max_tokens: a task of kind likelihood samples nothing",
        ),
    ],
)
def test_what_cannot_be_measured_is_told(data: Path, tasks: dict[str, Any], expected: str) -> None:
    tasks = json.loads(json.dumps(tasks).replace("{data}", str(data)))
    with pytest.raises(UserError) as caught:
        check_tasks(config(tasks))
    assert expected in str(caught.value)


def test_what_to_set_for_a_task_is_told_in_a_form_that_works(data: Path) -> None:
    values = yaml.safe_load((TASKS_DIRECTORY / "gsm8k.yaml").read_text())
    own = data / "it's mine.yaml"
    own.write_text(yaml.safe_dump({**values, "name": "mine", "path": f"{data}/sums.json"}))
    (data / "recipe.yaml").write_text(f"""evaluate: {{tasks: ["{own}"]}}""")  # a list, which has no keys to set
    with pytest.raises(UserError) as caught:
        check_tasks(load_config(data / "recipe.yaml", ["model.max_model_len=400"]))
    message = str(caught.value)
    assert message.startswith(f"evaluate.tasks.{own}: responses of up to 512 tokens leave no room")
    (override,) = shlex.split(message.partition("or set ")[2])
    settings = load_config(data / "recipe.yaml", ["model.max_model_len=400", override])
    (task,) = check_tasks(settings)
    assert task.sampling is not None
    assert task.sampling.max_tokens == 200


def test_what_to_set_for_a_task_keeps_the_others_and_their_settings(data: Path) -> None:
    tasks = {"svamp": {"path": str(write_svamp(data))}, "gsm8k": {"path": f"{data}/sums.json", "limit": 3}}
    with pytest.raises(UserError) as caught:
        check_tasks(config(tasks, "model.max_model_len=400"))
    override = shlex.split(str(caught.value).partition("or set ")[2])
    settings = load_config(overrides=override).evaluate.tasks
    found = {name: task.model_dump(exclude_none=True) for name, task in settings.items()}
    assert found == {**tasks, "gsm8k": {**tasks["gsm8k"], "max_tokens": 200}}


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"path": "none.json"}, ".path: no file matches none.json"),
        ({"path": "{data}/empty.json"}, ": {data}/empty.json: expected items, found no row"),
    ],
)
def test_a_task_file_is_named_by_its_path(data: Path, settings: dict[str, str], expected: str) -> None:
    (data / "empty.json").write_text("[]")
    own = data / "mine.yaml"
    own.write_text((TASKS_DIRECTORY / "gsm8k.yaml").read_text().replace("name: gsm8k", "name: mine"))
    settings = json.loads(json.dumps(settings).replace("{data}", str(data)))
    with pytest.raises(UserError) as caught:
        check_tasks(config({str(own): settings}))
    assert str(caught.value).startswith(f"evaluate.tasks.{own}{expected.replace('{data}', str(data))}")


def test_ids_are_unique_and_rows_are_there(data: Path) -> None:
    rows = json.loads((data / "choices.json").read_text())
    (data / "twice.json").write_text(json.dumps([rows[0], rows[1], rows[0]]))
    with pytest.raises(UserError, match=r"expected unique ids in column 'id', found 'c0' twice"):
        check_tasks(config({"arc_easy": {"path": f"{data}/twice.json"}}))
    (data / "empty.json").write_text("[]")
    with pytest.raises(UserError, match="expected items, found no row"):
        check_tasks(config({"arc_easy": {"path": f"{data}/empty.json"}}))


def test_data_that_changed_since_it_was_checked_is_told(data: Path) -> None:
    (task,) = check_tasks(config({"gsm8k": {"path": f"{data}/sums.json"}}))
    rows = json.loads((data / "sums.json").read_text())
    (data / "sums.json").write_text(json.dumps([*rows[:-1], {**rows[-1], "answer": "#### 99"}]))
    with pytest.raises(UserError, match=r"changed since it was checked: had 10 items .* found 10"):
        list(task.read())


def finish(run: RunDirectory, settings: Config, round: Round = BASE, **changes: Any) -> None:
    for task in check_tasks(settings):
        metrics = {"accuracy": replace(ENTRY, **changes)}
        evaluation = Evaluated(kind=task.task.kind, metric="accuracy", metrics=metrics)
        stage = run.stage(round, f"tasks/{task.name}")
        run.write_text(f"{stage}/examples/part-0.parquet", "")
        commit(run, stage, settings, name=task.name, definition=task.definition, evaluation=evaluation)


def test_finished_work_of_another_definition_is_refused_with_the_difference(data: Path) -> None:
    run = RunDirectory(str(data / "run"))
    finish(run, both(data, limit=5))
    finish(run, both(data, limit=5), Round(0))
    check_finished_tasks(check_tasks(both(data, limit=5)), run, range(3))
    check_finished_tasks(check_tasks(config({"svamp": {"path": f"{write_svamp(data)}"}})), run, range(3))
    with pytest.raises(UserError) as caught:
        check_finished_tasks(check_tasks(both(data, limit=4, max_tokens=9)), run, range(3))
    message = str(caught.value)
    assert message.startswith(f"evaluate.tasks.gsm8k: {run.root}/base/tasks/gsm8k holds results of another definition")
    assert "  limit: 5 there, 4 now\n" in message
    assert "'max_tokens': 512" in message
    assert "prompt_hash" not in message


def test_the_definition_holds_what_is_read_of_a_response_and_shown(data: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    sums, choices = check_tasks(both(data))
    assert (sums.definition.extraction, sums.definition.metric) == (f"number, rules {RULES}", "accuracy")
    assert choices.definition.extraction is None
    run = RunDirectory(str(data / "run"))
    finish(run, both(data))
    monkeypatch.setattr("mipo_ray.evaluation.tasks.task_check.RULES", RULES + 1)
    check_finished_tasks(check_tasks(both(data))[1:], run, ())
    with pytest.raises(UserError) as caught:
        check_finished_tasks(check_tasks(both(data))[:1], run, ())
    changed = f"  extraction: 'number, rules {RULES}' there, 'number, rules {RULES + 1}' now"
    assert str(caught.value).splitlines()[1:] == [changed]


def _forget_extraction(manifest: dict[str, Any]) -> None:
    del manifest["definition"]["extraction"], manifest["definition"]["metric"]


def test_results_from_before_the_rules_had_a_number_were_read_by_others(data: Path) -> None:
    run = RunDirectory(str(data / "run"))
    finish(run, both(data))
    for name in ("gsm8k", "arc_easy_likelihood"):
        edit_manifest(data / f"run/base/tasks/{name}/manifest.json", _forget_extraction)
    sums, choices = check_tasks(both(data))
    # Nothing is extracted of a likelihood, and the metric stood beside the definition.
    check_finished_tasks([choices], run, ())
    with pytest.raises(UserError) as caught:
        check_finished_tasks([sums], run, ())
    assert str(caught.value).splitlines()[1:] == [
        f"  extraction: not recorded there, 'number, rules {RULES}' now",
    ]
    other = replace(choices, task=choices.task.model_copy(update={"metric": "accuracy_normalized"}))
    with pytest.raises(UserError, match="  metric: 'accuracy' there, 'accuracy_normalized' now"):
        check_finished_tasks([other], run, ())


def write_svamp(directory: Path) -> Path:
    (directory / "svamp.json").write_text(json.dumps([{"ID": "a", "Body": "b", "Question": "c?", "Answer": 1}]))
    return directory / "svamp.json"


def test_evaluation_json_gathers_the_manifests_of_tasks_and_judgements(data: Path) -> None:
    run = RunDirectory(str(data / "run"))
    assert write_evaluation(run) == read_evaluation(run) == {}
    finish(run, both(data))
    for index in (0, 10):
        finish(run, both(data), Round(index), value=0.6, **CHANGE, verdict="not distinguishable")
    judged = Evaluated(kind="judge", metrics={"win": ENTRY})
    commit(run, "rounds/000/judge/pairwise", both(data), name="judge_pairwise", evaluation=judged)
    commit(run, "rounds/000/generate", both(data))
    evaluation = write_evaluation(run)
    assert evaluation == read_evaluation(run)
    assert to_json(evaluation) == json.loads((data / "run/evaluation.json").read_text())
    assert list(evaluation) == ["base", "0", "10"]
    assert list(evaluation["0"]) == ["judge_pairwise", "arc_easy_likelihood", "gsm8k"]
    lines = final_tables(run).splitlines()
    assert [line.split()[:4] for line in lines if line.startswith("gsm8k")] == [
        ["gsm8k", "accuracy", "10", policy] for policy in ("base", "0", "10")
    ]
    (first,) = [line for line in lines if line.startswith("gsm8k") and line.split()[3] == "0"]
    assert "0.600 [0.240, 0.760]" in first
    assert "+0.100 [-0.100, +0.300]" in first
    assert first.endswith("not distinguishable")
    assert "judge_pairwise" not in final_tables(run)
