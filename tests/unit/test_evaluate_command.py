"""The evaluate command as far as it goes without an engine: plans, refusals, and what is finished already.

python -m pytest tests/unit/test_evaluate_command.py
"""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
from safetensors.numpy import save_file

from mipo_ray.config.recipe import load_config
from mipo_ray.evaluate import main
from mipo_ray.evaluation.tasks.task_check import check_tasks
from mipo_ray.storage.configuration import record_config
from mipo_ray.storage.entries import Evaluated
from mipo_ray.storage.lock import hold_lock
from mipo_ray.storage.results import write_evaluation
from mipo_ray.storage.rounds import BASE, Round, base_and_rounds
from mipo_ray.storage.run_directory import RunDirectory, open_run
from tests.helpers.stages import commit
from tests.helpers.task_entries import CHANGE, ENTRY


@pytest.fixture(autouse=True)
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")


@pytest.fixture
def recipe(tmp_path: Path) -> str:
    """A recipe of a model that passes the check, two tasks with local data, and no held-out prompts."""
    model = tmp_path / "model"
    model.mkdir()
    (model / "config.json").write_text(json.dumps({"model_type": "llama"}))
    save_file({"weight": numpy.arange(12, dtype=numpy.float32)}, model / "model.safetensors")
    (model / "tokenizer.json").write_text("{}")
    (model / "chat_template.jinja").write_text("{{ messages }}")
    (tmp_path / "sums.json").write_text(json.dumps([{"question": "1 + 1?", "answer": "#### 2"}] * 4))
    choice = {"question": "One?", "choices": ["a", "b"], "answerKey": "B"}
    (tmp_path / "choices.json").write_text(json.dumps([choice] * 3))
    path = tmp_path / "recipe.yaml"
    path.write_text(
        f"run_dir: {tmp_path}/run\nrounds: 3\nmodel: {{path: {model}, max_model_len: 2048}}\n"
        "prompts: {path: nowhere.jsonl}\n"
        "evaluate:\n  prompts: {path: nowhere.jsonl}\n"
        f"  tasks:\n    gsm8k: {{path: {tmp_path}/sums.json}}\n"
        f"    arc_easy_likelihood: {{path: {tmp_path}/choices.json}}\n"
    )
    return str(path)


def finish(run: RunDirectory, recipe: str, round: Round, *names: str) -> None:
    config = load_config(recipe)
    for task in check_tasks(config):
        if task.name in names:
            metrics = {"accuracy": ENTRY if round.is_base else replace(ENTRY, **CHANGE, verdict="better")}
            evaluation = Evaluated(kind=task.task.kind, metric="accuracy", metrics=metrics)
            facts = {"definition": task.definition, "name": task.name, "evaluation": evaluation}
            commit(run, run.stage(round, f"tasks/{task.name}"), config, **facts)


def train(run: RunDirectory, recipe: str, *rounds: int) -> None:
    for index in rounds:
        run.write_text(f"{run.stage(Round(index), 'train')}/policy/config.json", "{}")
        commit(run, run.stage(Round(index), "train"), load_config(recipe))


def test_a_dry_run_of_a_recipe_shows_tasks_and_items(recipe: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--dry-run", recipe]) == 0
    out = capsys.readouterr().out
    assert "policies        base\n" in out
    assert "gsm8k: 4 items of " in out
    assert "responses of up to 512 tokens, temperature 0" in out
    assert "arc_easy_likelihood: 3 items of " in out
    assert "to do           base/tasks/gsm8k, base/tasks/arc_easy_likelihood\n" in out
    assert out.endswith("dry run: nothing was started\n")


def test_a_dry_run_imports_no_engine(recipe: str) -> None:
    code = (
        "import sys\nfrom mipo_ray.evaluate import main\nassert main(['--dry-run', sys.argv[1]]) == 0\n"
        "print([name for name in ('torch', 'ray', 'vllm', 'transformers', 'deepspeed') if name in sys.modules])\n"
    )
    done = subprocess.run([sys.executable, "-c", code, recipe], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "[]"


def test_tasks_is_short_for_evaluate_tasks(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([recipe, "--dry-run", f"tasks={{gsm8k_zero_shot: {{path: {tmp_path}/sums.json}}}}"]) == 0
    assert "to do           base/tasks/gsm8k_zero_shot\n" in capsys.readouterr().out
    assert main([recipe, "--dry-run", "tasks.gsm8k.limit=2", "tasks.gsm8k.max_tokens=7"]) == 0
    assert "gsm8k: 2 items" in capsys.readouterr().out


@pytest.mark.parametrize("name", ["context=none", "exp #1", "rounds=1: [x]", "run.yaml", "tasks = all"])
def test_a_run_of_any_name_is_evaluated(
    recipe: str, name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(f"{tmp_path}/{name}")
    record_config(run, load_config(recipe))
    # Without a slash before it, what stands before an equals sign is a key where it is one.
    for target in (run.url, f"./{name}", *([] if name.startswith(("rounds", "tasks")) else [name])):
        assert main(["--dry-run", "tasks.gsm8k.limit=2", target]) == 0
        assert run.url in capsys.readouterr().out


def test_tasks_of_a_finished_run_may_have_a_larger_window(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(f"{tmp_path}/run")
    record_config(run, load_config(recipe, ["model.max_model_len=400"]))
    finish(run, recipe, BASE, "gsm8k")
    assert main(["--dry-run", run.url]) == 2
    assert "raise evaluate.task_max_model_len, or set 'evaluate.tasks={" in capsys.readouterr().err
    assert main(["--dry-run", run.url, "model.max_model_len=2048"]) == 2  # the run's own window defines its pairs
    assert "model.max_model_len" in capsys.readouterr().err
    assert main(["--dry-run", run.url, "task_max_model_len=2048"]) == 0
    out = capsys.readouterr().out
    assert "task window     2048 tokens\n" in out
    assert "to do           base/tasks/arc_easy_likelihood\n" in out  # what is finished stays so


def test_a_run_is_measured_in_its_base_and_its_trained_rounds(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(f"{tmp_path}/run")
    record_config(run, load_config(recipe))
    train(run, recipe, 0, 1)
    finish(run, recipe, BASE, "gsm8k")
    assert main(["--dry-run", run.url]) == 0
    out = capsys.readouterr().out
    assert "policies        base, 0, 1\n" in out
    to_do = ["base/tasks/arc_easy_likelihood"]
    to_do += [f"rounds/00{index}/tasks/{name}" for index in (0, 1) for name in ("gsm8k", "arc_easy_likelihood")]
    assert f"to do           {', '.join(to_do)}\n" in out


def test_a_moved_run_is_measured_where_it_is(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(f"{tmp_path}/elsewhere")
    record_config(run, load_config(recipe))
    assert main(["--dry-run", run.url]) == 0
    assert f"run directory   {tmp_path}/elsewhere\n" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_what_is_finished_is_shown_and_not_measured_again(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = open_run(f"{tmp_path}/run")
    record_config(run, load_config(recipe))
    for round in (BASE, Round(0)):
        finish(run, recipe, round, "gsm8k", "arc_easy_likelihood")
    train(run, recipe, 0)
    write_evaluation(run)
    assert main([run.url]) == 0
    out = capsys.readouterr().out
    assert "finished before, nothing to do" in out
    assert "0.500 [0.240, 0.760]" in out
    assert "better" in out


def test_what_a_kill_after_the_last_commit_left_undone_is_done(recipe: str, tmp_path: Path) -> None:
    run = open_run(f"{tmp_path}/run")
    record_config(run, load_config(recipe))
    train(run, recipe, 0)
    for round in (BASE, Round(0)):
        finish(run, recipe, round, "gsm8k", "arc_easy_likelihood")
        run.write_text(run.stage(round, "tasks_sampled/definitions.json"), "{}")
    run.write_text("report.html", "without tasks")
    assert main([run.url]) == 0
    report = tmp_path / "run/report.html"
    assert "arc_easy_likelihood" in report.read_text()
    assert not list((tmp_path / "run").rglob("tasks_sampled"))
    before = report.stat().st_mtime_ns
    assert main([run.url]) == 0
    assert report.stat().st_mtime_ns == before  # what is up to date is left alone


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["tasks=[gsm9k]"], "evaluate.tasks: no task 'gsm9k'; did you mean 'gsm8k'?"),
        (["tasks=[]"], "tasks: expected at least one of arc_challenge, "),
        (["tasks.gsm8k.path=none.json"], "evaluate.tasks.gsm8k.path: no file matches none.json"),
        (
            ["generation.pool.min_size=99", "generation.pool.max_size=99"],
            "generation needs 100 CPUs and the cluster has",
        ),
        (["model.path=nowhere"], "model.path 'nowhere'"),
        (["tasks.gsm8k.size=3"], "evaluate.tasks.gsm8k.size: unknown key"),
    ],
)
def test_mistakes_are_told_before_anything_starts(
    recipe: str, tmp_path: Path, arguments: list[str], expected: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for options in (["--dry-run"], []):
        assert main([*options, recipe, *arguments]) == 2
        assert expected in capsys.readouterr().err
    assert not list((tmp_path / "run").rglob("manifest.json"))


def test_a_directory_that_is_no_run_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([f"{tmp_path}/nothing", "tasks=gsm8k"]) == 2
    assert "expected a recipe (.yaml) or a run directory with a config.yaml" in capsys.readouterr().err


def test_other_results_are_refused(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(f"{tmp_path}/run")
    record_config(run, load_config(recipe))
    finish(run, recipe, BASE, "gsm8k")
    assert main([run.url, "tasks.gsm8k.limit=2"]) == 2
    assert "  limit: None there, 2 now" in capsys.readouterr().err
    assert main([run.url, "train.beta=0.7"]) == 2
    assert "train.beta: 0.1 there, 0.7 now" in capsys.readouterr().err


def test_a_run_in_use_is_refused(recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = open_run(f"{tmp_path}/run")
    run.check_writable()
    with hold_lock(run):
        assert main([recipe]) == 2
    assert "in use by process" in capsys.readouterr().err


def test_a_judge_judges_answers_that_a_run_has_sampled(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Question {index}?", "context": f"I am {index}."} for index in range(6)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"evaluate.prompts.path={tmp_path}/held_out.jsonl", "tasks={}", f"judge.model={tmp_path}/model"]
    run = open_run(f"{tmp_path}/run")
    config = load_config(recipe, arguments[:1])
    record_config(run, config)
    train(run, recipe, 0)
    assert main(["--dry-run", run.url, *arguments]) == 2
    assert f"judge: {tmp_path}/run/base/evaluate: expected held-out answers to judge, found" in capsys.readouterr().err
    for round in (BASE, Round(0)):
        commit(run, run.stage(round, "evaluate"), config)
    assert main(["--dry-run", run.url, *arguments]) == 0
    out = capsys.readouterr().out
    assert f"judge           {tmp_path}/model: pairwise 24 of each round (each pair in both orders)" in out
    assert "to do           rounds/000/judge/pairwise\n" in out
    assert main(["--dry-run", run.url, *arguments, "judge.protocols=[pointwise]"]) == 2
    assert "expects a reference answer in every row, found none in 6 of 6 rows" in capsys.readouterr().err


def test_policies_without_held_out_answers_are_named_beside_a_judge(
    recipe: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"prompt": f"Question {index}?", "context": f"I am {index}."} for index in range(6)]
    (tmp_path / "held_out.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    arguments = [f"evaluate.prompts.path={tmp_path}/held_out.jsonl", f"judge.model={tmp_path}/model"]
    run = open_run(f"{tmp_path}/run")
    config = load_config(recipe, arguments[:1])
    record_config(run, config)
    train(run, recipe, 0, 1)
    nothing = "judge           nothing to judge: base has no held-out answers\n"
    assert main(["--dry-run", run.url, *arguments]) == 0
    assert nothing in capsys.readouterr().out
    for round in base_and_rounds((0, 1)):
        finish(run, recipe, round, "gsm8k", "arc_easy_likelihood")
    assert main([run.url, *arguments]) == 0
    out = capsys.readouterr().out
    assert "finished before, nothing to do" in out
    assert nothing in out
    for round in (BASE, Round(0)):
        commit(run, run.stage(round, "evaluate"), config)
    assert main(["--dry-run", run.url, *arguments]) == 0
    out = capsys.readouterr().out
    assert f"judge           {tmp_path}/model: pairwise" in out
    assert "judge           not round 1: it has no held-out answers\n" in out
    assert nothing not in out
    commit(run, run.stage(Round(1), "evaluate"), config)
    assert main(["--dry-run", run.url, *arguments]) == 0
    assert "no held-out answers" not in capsys.readouterr().out
    assert main(["--dry-run", run.url, *arguments[:1]]) == 0
    assert "judge   " not in capsys.readouterr().out
