"""Accuracy tasks inside the loop and by the evaluate command, over real vLLM and Ray: whole runs, a kill, refusals.

python -m pytest tests/integration/test_evaluation_loop.py
"""

from __future__ import annotations

import json
from pathlib import Path

import pyarrow.parquet
import pytest

from mipo_ray import evaluate
from tests.helpers.golden_run import ANSWERS, CHOICES, SUMS, GoldenRun
from tests.helpers.runs import (
    events,
    examples,
    finish,
    joined_cluster,
    kill_when,
    snapshot,
    start_evaluation,
)

LONG = 96  # items of the task that is killed


def test_the_loop_measures_the_base_and_the_rounds(golden_run: GoldenRun) -> None:
    run_dir, output = golden_run.directory, golden_run.output
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    assert list(evaluation) == ["base", "0", "1"]
    for policy in evaluation:
        svamp, arc = evaluation[policy]["short_svamp"], evaluation[policy]["arc_easy_likelihood"]
        assert (svamp["kind"], svamp["version"], svamp["metrics"]["accuracy"]["n"]) == ("generative", 3, SUMS)
        assert (arc["kind"], arc["metrics"]["accuracy"]["n"]) == ("likelihood", CHOICES)
        assert svamp["data"].endswith("/sums.json")
        assert len(svamp["prompt_hash"]) == 12
        assert set(arc["metrics"]) == {"accuracy", "accuracy_normalized", "no_answer"}
        choice = evaluation[policy]["preference_choice"]
        assert (choice["kind"], set(choice["metrics"])) == ("choice", {"accuracy", "no_answer"})
        found = choice["metrics"]["accuracy"]
        # One question alone: users are what is resampled, and no test of independent items is made.
        assert (found["n"], found["users"], found["interval"]) == (ANSWERS, ANSWERS, "bootstrap")
        assert "p_value" not in found
        entry = arc["metrics"]["accuracy"]
        assert entry["low"] <= entry["value"] <= entry["high"]
        assert ("verdict" in entry) == ("p_value" in entry) == ("change" in entry) == (policy != "base")
    assert "short_svamp" in output
    assert "arc_easy_likelihood" in output
    # An engine for each of the three processes that made the run; what it samples from next goes into it.
    engines = [
        (event["event"], event["round"], event["stage"])
        for event in events(run_dir)
        if event["event"] in ("engine_start", "weight_swap", "weight_swap_failure")
    ]
    assert engines == [
        ("engine_start", None, "evaluate"),
        ("engine_start", 0, "generate"),
        ("engine_start", 0, "evaluate"),
        ("weight_swap", 1, "evaluate"),
    ]


def test_the_examples_are_what_the_numbers_come_from(golden_run: GoldenRun) -> None:
    run_dir = golden_run.directory
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for policy, name in (("base", "base"), ("0", "rounds/000"), ("1", "rounds/001")):
        rows = examples(run_dir, name, "short_svamp")
        assert [row["item_id"] for row in rows] == [f"s{i}" for i in range(SUMS)]
        assert [row["answer"] for row in rows] == [str(i) for i in range(SUMS)]
        assert "<|im_start|>user\nDan has 3 pens. How many?" in rows[3]["prompt"]
        assert all(0 < row["tokens"] <= 12 for row in rows)
        assert {row["verdict"] for row in rows} <= {"correct", "wrong", "no_answer"}
        truncated = sum(row["finish_reason"] == "length" for row in rows) / SUMS
        assert evaluation[policy]["short_svamp"]["metrics"]["truncated"]["value"] == pytest.approx(truncated)
        rows = examples(run_dir, name, "arc_easy_likelihood")
        assert [row["item_id"] for row in rows] == [f"c{i}" for i in range(CHOICES)]
        for row in rows:
            best = row["option_logprobs"].index(max(row["option_logprobs"]))
            assert row["extracted"] == row["option_labels"][best]
            assert row["prompt"] == f"Question: What is number {row['item_id'][1:]}?\nAnswer:"
        correct = sum(row["extracted"] == row["answer"] for row in rows) / CHOICES
        assert evaluation[policy]["arc_easy_likelihood"]["metrics"]["accuracy"]["value"] == pytest.approx(correct)
    assert not (run_dir / "base/tasks_sampled").exists()


def test_the_log_probs_of_options_are_those_of_transformers(golden_run: GoldenRun, tiny_model: Path) -> None:
    """Every option after the same context: were vLLM's prefix cache used for prompt log-probs, they would be wrong."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    run_dir = golden_run.directory
    trained = {name: run_dir / name / "train/policy" for name in ("rounds/000", "rounds/001")}
    for policy, path in {"base": tiny_model, **trained}.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)
        for row in examples(run_dir, policy, "arc_easy_likelihood"):
            context = tokenizer(row["prompt"])["input_ids"]
            for text, found, count in zip(
                row["option_texts"], row["option_logprobs"], row["option_tokens"], strict=True
            ):
                ids = tokenizer(f"{row['prompt']} {text}")["input_ids"]
                assert len(ids) - len(context) == count
                with torch.inference_mode():
                    logprobs = model(torch.tensor([ids])).logits[0, len(context) - 1 : -1].log_softmax(-1)
                expected = float(logprobs.gather(1, torch.tensor(ids[len(context) :])[:, None]).sum())
                assert found == pytest.approx(expected, abs=1e-3)


def test_a_choice_is_by_what_the_user_said_and_as_transformers_says(golden_run: GoldenRun, tiny_model: Path) -> None:
    """The whole answer with the end of its turn, after the conversation with what is known of the user and without."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    for policy, path in {"base": tiny_model, "rounds/001": golden_run.directory / "rounds/001/train/policy"}.items():
        tokenizer = AutoTokenizer.from_pretrained(path)
        model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float32)

        def logprob(question: str, answer: str, tokenizer=tokenizer, model=model) -> float:
            asked = [{"role": "user", "content": question}]
            told = [*asked, {"role": "assistant", "content": answer}]
            prompt = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_dict=True)["input_ids"]
            ids = tokenizer.apply_chat_template(told, return_dict=True)["input_ids"]
            assert ids[: len(prompt)] == prompt
            with torch.inference_mode():
                logprobs = model(torch.tensor([ids])).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            return float(logprobs.gather(1, torch.tensor(ids[len(prompt) :])[:, None]).sum())

        rows = examples(golden_run.directory, policy, "preference_choice")
        assert len(rows) == ANSWERS
        for row in rows:
            told, untold = (
                [logprob(question, text) for text in row["option_texts"]]
                for question in (f"{row['user']}\n\n{row['question']}", row["question"])
            )
            assert row["option_logprobs"] == pytest.approx(told, abs=1e-3)
            pmi = [one - other for one, other in zip(told, untold, strict=True)]
            assert row["option_pmi"] == pytest.approx(pmi, abs=2e-3)
            assert row["extracted"] == row["option_labels"][row["option_pmi"].index(max(row["option_pmi"]))]


def test_a_finished_run_takes_more_tasks_and_a_kill_loses_no_item(
    golden_run: GoldenRun, ray_address: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run_dir, data = golden_run.copy(tmp_path / "run"), golden_run.data
    places = [run_dir / name / "tasks/short_svamp" for name in ("base", "rounds/000", "rounds/001")]
    before = list(map(snapshot, places))
    questions = [{"question": f"What is {i} and {i}?", "answer": f"#### {2 * i}"} for i in range(LONG)]
    (tmp_path / "long.json").write_text(json.dumps(questions))
    tasks = (
        f"tasks={{{data}/short_svamp.yaml: {{path: {data}/sums.json}}, "
        f"arc_challenge_likelihood: {{path: {data}/choices.jsonl, limit: 7}}, "
        f"gsm8k_zero_shot: {{path: {tmp_path}/long.json, max_tokens: 64}}}}"
    )
    rows = run_dir / "base/tasks_sampled/rows"
    kill_when(start_evaluation(ray_address, str(run_dir), tasks), lambda: len(list(rows.glob("*.parquet"))) > 2)
    checkpoint = run_dir / "base/tasks_sampled/checkpoint"
    committed = {path.stem for path in checkpoint.glob("*.parquet") if "pending" not in path.name}
    saved = sum(
        pyarrow.parquet.read_metadata(path).num_rows
        for path in rows.glob("*.parquet")
        if any(path.name.startswith(name) for name in committed)
    )
    assert 0 < saved < LONG

    output = finish(start_evaluation(ray_address, str(run_dir), tasks))
    assert "policies        base, 0, 1" in output
    evaluation = json.loads((run_dir / "evaluation.json").read_text())
    for policy in ("base", "0", "1"):
        assert set(evaluation[policy]) == {
            "short_svamp",
            "arc_easy_likelihood",
            "preference_choice",
            "arc_challenge_likelihood",
            "gsm8k_zero_shot",
        }
        assert evaluation[policy]["arc_challenge_likelihood"]["metrics"]["accuracy"]["n"] == 7
    assert before == list(map(snapshot, places))

    for policy in ("base", "rounds/000", "rounds/001"):
        found = examples(run_dir, policy, "gsm8k_zero_shot")
        assert [row["answer"] for row in found] == [str(2 * i) for i in range(LONG)]
        assert len({row["item_id"] for row in found}) == LONG
        assert not (run_dir / policy / "tasks_sampled").exists()
    # What was committed before the kill was not sampled again.
    assert 0 < rows_of_the_last_call_for_the_base(run_dir) <= LONG + 7 - saved

    after = snapshot(run_dir)
    options = (str(run_dir), tasks, f"ray.address={ray_address}")
    assert evaluate.main(options) == 0
    assert "finished before, nothing to do" in capsys.readouterr().out
    assert snapshot(run_dir) == after

    assert evaluate.main([option.replace("limit: 7", "limit: 6") for option in options]) == 2
    assert "limit: 7 there, 6 now" in capsys.readouterr().err
    assert snapshot(run_dir) == after


def rows_of_the_last_call_for_the_base(run_dir: Path) -> int:
    """Rows that went through the base's engine since its stage started for the last time."""
    found = events(run_dir)
    is_base = [event.get("round") is None for event in found]
    started = max(index for index, event in enumerate(found) if event["event"] == "stage_start" and is_base[index])
    return sum(
        event["rows"]
        for event, base in zip(found[started:], is_base[started:], strict=True)
        if event["event"] == "generated" and base
    )


def test_a_model_is_measured_without_a_run_and_a_prompt_too_long_is_refused_before_any_engine(
    ray_address: str, tiny_model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = [{"question": "word " * (200 if index == 1 else 3), "answer": "#### 1"} for index in (0, 1)]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    # No prompts, no held-out prompts: measuring a model needs neither.
    (tmp_path / "recipe.yaml").write_text(
        f"run_dir: {tmp_path}/run\nmodel: {{path: {tiny_model}, max_model_len: 512}}\n"
        "prompts: {path: nowhere.jsonl}\nevaluate: {prompts: {path: nowhere.jsonl}}\n"
    )
    task = f"tasks={{gsm8k_zero_shot: {{path: {tmp_path}/long.json, max_tokens: 12}}}}"
    options = [f"{tmp_path}/recipe.yaml", task, f"ray.address={ray_address}"]
    for _ in range(2):  # what a refused call wrote is not taken for what fits
        with joined_cluster():
            assert evaluate.main(options) == 2
        output = capsys.readouterr().err
        assert "prompt 'gsm8k_zero_shot/long.json:2'" in output
        assert "expected at most 500 prompt tokens (evaluate.task_max_model_len 512 - max_tokens 12)" in output
    assert not any(event["event"] == "engine_start" for event in events(tmp_path / "run"))
    assert not list((tmp_path / "run").rglob("manifest.json"))

    with joined_cluster():
        assert evaluate.main([*options, "task_max_model_len=1024"]) == 0
    long = examples(tmp_path / "run", "base", "gsm8k_zero_shot")[1]
    assert long["prompt"].count("word") == 200
    assert 0 < long["tokens"] <= 12
