"""Choices: which of several answers fits what a user said. Rows, the bundled ones, what is scored, what is chosen.

python -m pytest tests/unit/evaluation/tasks/test_choice.py
"""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.recipe import load_config
from mipo_ray.errors import UserError
from mipo_ray.evaluation.tasks.examples import EXAMPLE_SCHEMA, examples_of, options_to_score
from mipo_ray.evaluation.tasks.items import Item, item_of, read_items
from mipo_ray.evaluation.tasks.stage import measure_examples
from mipo_ray.evaluation.tasks.task import Task, load_task
from mipo_ray.evaluation.tasks.task_check import check_tasks
from mipo_ray.evaluation.tasks.task_requests import ITEM_SCHEMA, item_rows, requests_of
from mipo_ray.generation.rendering import load_tokenizer
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.text.statistics import copy_rate
from tests.helpers.tiny_model import make_tiny_model

ROW = {"preference": "I ski.", "question": "Where to?", "options": ["The Alps.", "The sea."], "answer": 0}


@pytest.fixture(scope="module")
def bundled() -> list[Item]:
    task = load_task("preference_choice")
    return list(read_items(task, find_files(task.path), None))


def item(task: Task, **changes: Any) -> Item:
    return item_of(task, SourceRow("rows.jsonl, line 7", "rows.jsonl:7", {**ROW, **changes}))


def test_each_answer_is_asked_for_once_so_that_no_blind_rule_does_better_than_chance(bundled: list[Item]) -> None:
    assert len(bundled) == 208
    assert len({one.user for one in bundled}) == len({one.question for one in bundled}) == 52
    right: dict[str, Counter[str]] = {}
    for one in bundled:
        right.setdefault(one.question, Counter())[one.answer] += 1
    assert all(counts == Counter("ABCD") for counts in right.values())
    rules = {
        "longest": lambda texts: max(range(4), key=lambda number: len(texts[number])),
        "shortest": lambda texts: min(range(4), key=lambda number: len(texts[number])),
        "first": lambda texts: 0,
    }
    for rule in rules.values():
        assert sum(one.option_labels[rule(one.option_texts)] == one.answer for one in bundled) == 52
    assert all(len(set(one.option_texts)) == 4 for one in bundled)


def test_no_bundled_answer_repeats_a_phrase_of_what_its_user_said(bundled: list[Item]) -> None:
    for one in bundled:
        assert copy_rate(one.option_texts[one.option_labels.index(one.answer)], one.user) == 0


def test_what_is_known_of_the_user_stands_before_the_question_and_can_be_left_out() -> None:
    found = item(load_task("preference_choice"))
    assert found.messages == [{"role": "user", "content": "I ski.\n\nWhere to?"}]
    assert found.question_messages == [{"role": "user", "content": "Where to?"}]
    assert (found.answer, found.user, found.question) == ("A", "I ski.", "Where to?")


def test_published_columns_are_read_as_they_are() -> None:
    row = {
        "personality": ["I ski.", "I have two dogs."],
        "history": ["Hello.", "How are you?"],
        "candidates": [f"Reply {number}." for number in range(19)] + ["I have been skiing."],
    }
    found = item(load_task("personachat_choice"), **row)
    assert found.messages[-1]["content"] == "I ski. I have two dogs.\n\nHello.\nHow are you?"
    assert found.option_texts[found.option_labels.index(found.answer)] == "I have been skiing."
    found = item(load_task("prefeval_choice"), classification_task_options=["Ski.", "Swim.", "Run.", "Sit."])
    assert (found.answer, found.option_texts[0]) == ("A", "Ski.")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"preference": None}, "rows.jsonl, line 7: context_template: expected text .* found null"),
        ({"preference": "  "}, "rows.jsonl, line 7: context_template: expected some text"),
        ({"options": ["The Alps.", ""]}, "field 'options': expected 2 to 26 options"),
        ({"answer": 2}, "field 'answer': expected the label of one of the options"),
    ],
)
def test_a_row_that_is_no_choice_is_named(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        item(load_task("preference_choice"), **changes)


def test_a_missing_column_is_named() -> None:
    task = load_task("preference_choice")
    with pytest.raises(UserError, match="'preference', which context_template uses"):
        item_of(task, SourceRow("a, line 1", "a:1", {name: ROW[name] for name in ("question", "options", "answer")}))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"context_template": None}, "kind choice needs context_template"),
        ({"continuation": "text"}, "kind choice has no continuation"),
        ({"answer_index": 0}, "expected answer_column or answer_index, found both"),
        ({"answer_column": None}, "expected answer_column or answer_index, found none"),
        ({"metric": "accuracy_normalized"}, "kind choice has the metric accuracy alone"),
        ({"kind": "likelihood", "continuation": "text"}, "kind likelihood has no context_template"),
    ],
)
def test_a_task_file_that_is_no_choice_is_refused(changes: dict[str, Any], message: str) -> None:
    values = load_task("preference_choice").model_dump() | changes
    with pytest.raises(ValueError, match=message):
        Task.model_validate(values)


def test_every_answer_is_scored_with_and_without_what_is_known_of_the_user(tmp_path: Path) -> None:
    model = make_tiny_model(tmp_path / "tiny")
    (tmp_path / "rows.jsonl").write_text(json.dumps(ROW) + "\n")
    tasks = {"preference_choice": {"path": f"{tmp_path}/rows.jsonl"}}
    config = load_config(overrides=[f"evaluate.tasks={json.dumps(tasks)}", f"model.path={model}"])
    (task,) = check_tasks(config)
    requests = requests_of(pa.Table.from_pylist(list(item_rows(task)), schema=ITEM_SCHEMA), task=task, config=config)
    (asked,) = options_to_score(requests)
    tokenizer = load_tokenizer(str(model), False)
    expected = []
    for question in ("I ski.\n\nWhere to?", "Where to?"):
        for answer in ROW["options"]:
            chat = [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]
            expected.append(tokenizer.apply_chat_template(chat, return_dict=True)["input_ids"])
    assert [one["prompt_token_ids"] + one["response_token_ids"] for one in asked] == expected
    assert [one["negative"] for one in asked] == [0, 1, 2, 3]


@given(
    st.lists(st.integers(-400, 400), min_size=3, max_size=3), st.lists(st.integers(-400, 400), min_size=3, max_size=3)
)
def test_the_answer_is_the_one_that_what_is_known_makes_likelier_than_any_other(told: list, untold: list) -> None:
    texts, labels = ["one", "two", "three"], ["A", "B", "C"]
    scores = [{"negative": number, "logprob": float(value)} for number, value in enumerate([*told, *untold])]
    row = {"key": "k", "task": "t", "position": 0, "item_id": "i", "prompt": "p", "answer": "B"}
    row |= {"option_labels": labels, "option_texts": texts, "user": "u", "question": "q", "responses": []}
    row |= {"scored": [{"prompt_token_ids": [1], "response_token_ids": [2, 3]}] * 6, "scores": scores[::-1]}
    (found,) = examples_of(pa.Table.from_pylist([row]), tasks={"t": load_task("preference_choice")}).to_pylist()
    gains = [one - other for one, other in zip(told, untold, strict=True)]
    assert found["option_pmi"] == gains
    best = [label for label, gain in zip(labels, gains, strict=True) if gain == max(gains)]
    assert found["extracted"] == (best[0] if len(best) == 1 else None)
    assert found["verdict"] == ("no_answer" if len(best) > 1 else "correct" if best == ["B"] else "wrong")


def table(right: list[bool], users: list[str], questions: list[str]) -> pa.Table:
    rows = [
        {"item_id": f"i{number}", "verdict": "correct" if one else "wrong", "user": user, "question": question}
        for number, (one, user, question) in enumerate(zip(right, users, questions, strict=True))
    ]
    return pa.Table.from_pylist(rows, schema=EXAMPLE_SCHEMA)


def test_items_of_one_user_and_one_question_are_no_independent_ones() -> None:
    """Every answer ten times over says no more than once: the interval stays that of 12 users and 12 questions."""
    task = load_task("preference_choice")
    pairs = [(user, question) for user in range(12) for question in range(12) if (user + question) % 3 == 0]
    right = [user % 2 == 0 for user, _ in pairs]

    def width(times: int) -> float:
        rows = table(
            right * times, [f"u{user}" for user, _ in pairs] * times, [f"q{question}" for _, question in pairs] * times
        )
        entry = measure_examples(task, rows, None, samples=500, seed=0)["accuracy"]
        assert (entry.users, entry.questions, entry.interval) == (12, 12, "bootstrap")
        return entry.high - entry.low

    assert width(10) == pytest.approx(width(1), rel=0.1)


def test_examples_of_an_earlier_version_are_measured_as_then() -> None:
    rows = table([True, False, True], [""] * 3, [""] * 3).drop_columns(["user", "question", "option_pmi"])
    rows = rows.set_column(rows.column_names.index("tokens"), "tokens", pa.array([3] * 3, pa.int32()))
    entry = measure_examples(load_task("svamp"), rows, None, samples=100, seed=0)["accuracy"]
    assert entry.interval == "wilson"
