"""Rows that do not fit the window are named before anything starts, counted with the real tokenizer.

python -m pytest tests/unit/planning/test_token_counts.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.evaluate import main as evaluate
from mipo_ray.generation.rendering import load_tokenizer, render_prompts
from mipo_ray.planning import token_counts
from mipo_ray.run import main
from tests.helpers.tiny_model import END, make_tiny_model

WINDOW, ANSWER = 256, 32
FITS = "water the plants " * 40  # 680 bytes; about 150 tokens
TOO_LONG = "water the plants " * 90


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny_model(tmp_path_factory.mktemp("tiny") / "model")


def write(path: Path, prompts: list[str]) -> None:
    rows = [{"prompt": prompt, "context": f"I am user {index}."} for index, prompt in enumerate(prompts)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture
def arguments(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    (tmp_path / "recipe.yaml").write_text("{}")
    for name in ("train", "held_out"):
        write(tmp_path / f"{name}.jsonl", [f"{FITS} {index}" for index in range(8)])
    return [
        "--dry-run",
        str(tmp_path / "recipe.yaml"),
        f"run_dir={tmp_path}/run",
        f"model.path={model}",
        f"model.max_model_len={WINDOW}",
        f"generation.sampling.max_tokens={ANSWER}",
        f"prompts.path={tmp_path}/train.jsonl",
        f"evaluate.prompts.path={tmp_path}/held_out.jsonl",
    ]


def tokens_of(model: Path, text: str, context: str) -> int:
    from transformers import AutoTokenizer

    messages = [{"role": "user", "content": f"{context}\n\n{text}"}]
    return len(
        AutoTokenizer.from_pretrained(model).apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
    )


def outcome(arguments: list[str], capsys: pytest.CaptureFixture[str], command: Any = main) -> tuple[int, str]:
    code = command(arguments)
    printed = capsys.readouterr()
    return code, printed.out + printed.err


@pytest.mark.parametrize("name", ["train", "held_out"])
def test_a_prompt_that_is_too_long_is_named(
    name: str, arguments: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / f"{name}.jsonl", [FITS, "b", TOO_LONG, "d", "e", "f"])
    tokens = tokens_of(model, TOO_LONG, "I am user 2.")
    code, said = outcome(arguments, capsys)
    assert code == 2
    assert f"{name}.jsonl" in said
    assert "line 3" in said
    assert f"{tokens} tokens and a response of up to {ANSWER} do not fit" in said
    assert f"at most {WINDOW - ANSWER} prompt tokens (model.max_model_len {WINDOW}" in said
    code, said = outcome([*arguments, f"model.max_model_len={tokens + ANSWER}"], capsys)
    assert code == 0, said
    assert f"the longest {tokens} tokens of at most {tokens}" in said
    assert outcome([*arguments, f"model.max_model_len={tokens + ANSWER - 1}"], capsys)[0] == 2


def test_control_tokens_in_a_prompt_are_counted_as_the_text_that_they_are(
    arguments: list[str], model: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    window = 4 * WINDOW
    quoted = f"{END} " * 150  # as control tokens they would fit
    assert tokens_of(model, quoted, "I am user 0.") < window / 2
    messages = [{"role": "user", "content": f"I am user 0.\n\n{quoted}"}]
    (token_ids,) = render_prompts(load_tokenizer(str(model)), [messages], ChatSettings({}))
    write(tmp_path / "train.jsonl", [quoted, "b", "c", "d", "e", "f"])
    code, said = outcome([*arguments, f"model.max_model_len={window}"], capsys)
    assert code == 2
    assert "train.jsonl, line 1" in said
    assert f"{len(token_ids)} tokens and a response of up to {ANSWER} do not fit" in said


def test_training_prompts_may_be_dropped_and_held_out_ones_not(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path / "train.jsonl", [FITS, "b", TOO_LONG, f"{TOO_LONG} again"])
    code, said = outcome([*arguments, "filters.drop_too_long=true"], capsys)
    assert code == 0, said
    assert "prompts: 4 long rows counted" in said
    assert "; 2 do not fit and are dropped" in said
    (tmp_path / "train.jsonl").rename(tmp_path / "held_out.jsonl")
    write(tmp_path / "train.jsonl", ["a", "b", "c"])
    code, said = outcome([*arguments, "filters.drop_too_long=true"], capsys)
    assert code == 2
    assert "held-out prompts are never dropped" in said


@pytest.mark.parametrize("task", ["arc_easy", "arc_easy_likelihood", "gsm8k_zero_shot"])
@pytest.mark.parametrize("command", [main, evaluate])
def test_an_item_that_is_too_long_is_named(
    task: str, command: Any, arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def items(question: str) -> None:
        answer = {"answer": "#### 2"} if task.startswith("gsm8k") else {"choices": ["a", "b"], "answerKey": "B"}
        rows = [{"question": text, **answer} for text in ("One?", question)]
        (tmp_path / "items.json").write_text(json.dumps(rows))

    settings = f"evaluate.tasks={{{task}: {{path: {tmp_path}/items.json"
    settings += "}}" if task.endswith("likelihood") else ", max_tokens: 32}}"
    items(TOO_LONG)
    code, said = outcome([*arguments, settings], capsys, command)
    assert code == 2
    assert "items.json" in said
    assert f"'{task}/" in said
    assert f"evaluate.task_max_model_len {WINDOW}" in said
    code, said = outcome([*arguments, settings, "evaluate.task_max_model_len=1024"], capsys, command)
    assert code == 0, said
    items("Two?")
    assert outcome([*arguments, settings], capsys, command)[0] == 0


def test_more_text_than_is_counted_is_told_and_counted_when_asked_for(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "MOST_TEXT", 3000)
    write(tmp_path / "train.jsonl", [*(f"{FITS} {index}" for index in range(6)), TOO_LONG])
    code, said = outcome(arguments, capsys)
    assert code == 0, said
    assert "prompts: 3 long rows not counted (more than 3,000 characters); --tokens counts them" in said
    code, said = outcome(["--tokens", *arguments], capsys)
    assert code == 2
    assert "line 7" in said


def test_short_prompts_load_no_tokenizer(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*_: Any) -> Any:
        raise AssertionError("loaded")

    monkeypatch.setattr(token_counts, "load_tokenizer", load)
    for name in ("train", "held_out"):
        write(tmp_path / f"{name}.jsonl", ["a", "b", "c", "d", "e"])
    code, said = outcome([*arguments, "model.max_model_len=1024"], capsys)
    assert code == 0, said
    assert "\ntokens " not in said
    write(tmp_path / "train.jsonl", [FITS * 2, "b", "c"])  # by its bytes it might not fit, by its tokens it does
    code, said = outcome([*arguments, "model.max_model_len=1024"], capsys)
    assert code == 0, said
    assert "tokens          prompts: 1 long rows counted\n" in said


def test_a_tokenizer_that_is_not_here_is_told(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(token_counts, "local_tokenizer", lambda _: None)
    code, said = outcome(arguments, capsys)
    assert code == 0, said
    assert "prompts: 8 long rows not counted (the tokenizer of " in said


def test_the_table_of_stages_has_a_space_behind_the_longest_name(
    arguments: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    name = "a_task_of_ones_own_with_quite_a_long_name"
    own = tmp_path / f"{name}.yaml"
    (tmp_path / "items.json").write_text(json.dumps([{"question": "One?", "answer": "1"}]))
    own.write_text(
        f"name: {name}\nversion: 1\nkind: generative\npath: {tmp_path}/items.json\nanswer_column: answer\n"
        "question_template: '{{ question }}'\nextraction: number\nsampling: {max_tokens: 8}\n"
    )
    code, said = outcome([*arguments, f"evaluate.tasks=[{own}]", "rounds=1"], capsys)
    assert code == 0, said
    table = said[said.index("stages\n") :].splitlines()[1:-1]
    assert len(table) == 6
    assert {line.split()[1:] == ["to", "do"] for line in table} == {True}
    assert len({line.index(" to do") for line in table}) == 1
    assert f"  rounds/000/tasks/{name}  to do" in table
