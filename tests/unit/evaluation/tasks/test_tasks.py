"""Task files, and how rows of every published format become items.

python -m pytest tests/unit/evaluation/tasks/test_tasks.py
"""

from __future__ import annotations

import json
from fractions import Fraction
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet
import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.errors import UserError
from mipo_ray.evaluation.tasks.items import LETTERS, Item, item_of, read_items
from mipo_ray.evaluation.tasks.task import TASKS_DIRECTORY, Task, extract, load_task, verdict
from mipo_ray.prompts.files import find_files
from mipo_ray.prompts.reading import SourceRow

NAMES = [
    "arc_challenge",
    "arc_challenge_likelihood",
    "arc_easy",
    "arc_easy_likelihood",
    "gsm8k",
    "gsm8k_zero_shot",
    "mmlu",
    "mmlu_likelihood",
    "personachat_choice",
    "preference_choice",
    "prefeval_choice",
    "svamp",
]
OWN_DATA = {"personachat_choice", "prefeval_choice", "preference_choice"}  # bundled, or without a file to name
PREFEVAL = {
    "preference": "I dislike crowds.",
    "question": "Where should I go?",
    "explanation": "Crowds are to be avoided.",
    "classification_task_options": ["A quiet bay.", "A fair.", "A concert.", "A parade."],
}
PERSONA = {
    "conv_id": 3,
    "utterance_idx": 1,
    "personality": ["I ski.", "I have two dogs."],
    "history": ["Hello.", "Hi, how are you?"],
    "candidates": [f"Reply {number}." for number in range(19)] + ["I have been skiing."],
}
ARC_NESTED = {
    "id": "Mercury_1",
    "question": "What do plants need?",
    "choices": {"text": ["light", "sand", "wool", "ice"], "label": ["A", "B", "C", "D"]},
    "answerKey": "A",
}
MMLU = {
    "question": " What is 2 + 2? ",
    "subject": "abstract_algebra",
    "choices": ["3", "4", "5", "6"],
    "answer": 1,
}


def row(values: dict[str, Any]) -> SourceRow:
    return SourceRow("rows.jsonl, line 7", "rows.jsonl:7", values)


def item(task: str, values: dict[str, Any]) -> Item:
    return item_of(load_task(task), row(values))


def test_the_tasks_are_those_and_each_file_is_named_as_its_task() -> None:
    assert sorted(path.stem for path in TASKS_DIRECTORY.glob("*.yaml")) == NAMES
    for name in NAMES:
        assert load_task(name).name == name
        assert load_task(name).path.startswith("hf://datasets/") != (name in OWN_DATA)


def test_gsm8k_has_eight_exemplars_and_the_zero_shot_one_none() -> None:
    values = {"question": "How many?", "answer": "He has 2 * 3 = <<2*3=6>>6.\n#### 1,206"}
    shot = item("gsm8k", values)
    assert [message["role"] for message in shot.messages] == ["user", "assistant"] * 8 + ["user"]
    assert all("The answer is " in message["content"] for message in shot.messages if message["role"] == "assistant")
    assert shot.messages[-1]["content"] == "How many?"
    assert (shot.answer, shot.item_id, shot.option_labels) == ("1206", "rows.jsonl:7", [])
    (alone,) = item("gsm8k_zero_shot", values).messages
    assert alone["content"].startswith("How many?\n\n")
    assert '"The answer is N."' in alone["content"]


@pytest.mark.parametrize(("answer", "expected"), [(51.0, "51"), ("51.0", "51"), ("2.5", "5/2"), (7, "7"), ("-3", "-3")])
def test_svamp_answers_are_exact_numbers(answer: Any, expected: str) -> None:
    found = item("svamp", {"ID": "chal-1", "Body": "Dan has 3 pens.", "Question": "How many pens?", "Answer": answer})
    assert found.answer == expected
    assert found.item_id == "chal-1"
    assert found.messages[-1]["content"] == "Dan has 3 pens. How many pens?"


@pytest.mark.parametrize("labels", [["A", "B", "C"], ["1", "2", "3", "4"], ["A", "B", "C", "D", "E"], ["1", "2", "3"]])
@pytest.mark.parametrize("nested", [True, False])
@pytest.mark.parametrize("task", ["arc_easy", "arc_challenge"])
def test_the_options_of_arc_keep_their_own_labels(task: str, nested: bool, labels: list[str]) -> None:
    texts = [f"option {label}" for label in labels]
    options: dict[str, Any] = (
        {"choices": {"text": texts, "label": labels}} if nested else {"choices": texts, "labels": labels}
    )
    for answer in labels:
        found = item(task, {"id": "x", "question": "Which?", "answerKey": answer, **options})
        assert found.answer == answer
        lines = found.messages[-1]["content"].split("\n")
        assert lines[: len(labels) + 2] == ["Which?", *(f"{label}. option {label}" for label in labels), ""]
        assert found.option_texts == texts
        likelihood = item(f"{task}_likelihood", {"id": "x", "question": "Which?", "answerKey": answer, **options})
        assert likelihood.messages == [{"role": "user", "content": "Question: Which?\nAnswer:"}]
        assert (likelihood.option_labels, likelihood.answer) == (labels, answer)


def test_mmlu_answers_are_indices_and_its_likelihood_shows_the_options() -> None:
    found = item("mmlu", MMLU)
    assert (found.answer, found.option_labels) == ("B", ["A", "B", "C", "D"])
    assert "\nA. 3\nB. 4\nC. 5\nD. 6\n" in found.messages[-1]["content"]
    (context,) = item("mmlu_likelihood", MMLU).messages
    assert context["content"] == (
        "The following are multiple choice questions (with answers) about abstract algebra.\n\n"
        "What is 2 + 2?\nA. 3\nB. 4\nC. 5\nD. 6\nAnswer:"
    )


@pytest.mark.parametrize("name", NAMES)
def test_items_come_from_every_file_format_alike(name: str, tmp_path: Path) -> None:
    source = {
        "gsm8k": {"question": "How many?", "answer": "#### 3"},
        "svamp": {"ID": "c", "Body": "Three.", "Question": "How many?", "Answer": "3.0"},
        "arc": ARC_NESTED,
        "mmlu": MMLU,
        "personachat": PERSONA,
        "prefeval": PREFEVAL,
        "preference": {**PREFEVAL, "options": PREFEVAL["classification_task_options"], "answer": 2},
    }[name.split("_")[0]]
    rows = [source, {**source, "ID": "d", "id": "d"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(values) + "\n" for values in rows))
    (tmp_path / "rows.json").write_text(json.dumps(rows, indent=2))
    pyarrow.parquet.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    task = load_task(name)
    found = [list(read_items(task, find_files(f"{tmp_path}/rows.{end}"), None)) for end in ("jsonl", "json", "parquet")]
    asked = [[(one.messages, one.answer, one.option_labels, one.option_texts) for one in items] for items in found]
    assert len(asked[0]) == 2
    assert asked[0] == asked[1] == asked[2]
    assert len(list(read_items(task, find_files(f"{tmp_path}/rows.json"), 1))) == 1


@pytest.mark.parametrize(
    ("task", "values", "expected"),
    [
        (
            "gsm8k",
            {"question": "How many?"},
            "no column 'answer', which task gsm8k reads; the row has the columns: question",
        ),
        (
            "gsm8k",
            {"question": "How many?", "answer": "many"},
            "field 'answer': expected a number, or text that ends in",
        ),
        (
            "gsm8k",
            {"question": " ", "answer": "#### 3"},
            "question_template: expected some text, found an empty string",
        ),
        ("svamp", {"Body": "a", "Question": "b", "Answer": None}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": float("nan")}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": "1e999999999"}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": "-1E-999999999"}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": "1e" + "9" * 5000}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": "9" * 5000}, "field 'Answer': expected a number"),
        ("svamp", {"Body": "a", "Question": "b", "Answer": 10**5000}, "field 'Answer': expected a number"),
        ("arc_easy", {**ARC_NESTED, "answerKey": "E"}, "label of one of the options (A, B, C, D); found 'E'"),
        ("arc_easy", {**ARC_NESTED, "choices": ["light"]}, "field 'choices': expected 2 to 10 options"),
        ("arc_easy", {**ARC_NESTED, "choices": "light, sand"}, "field 'choices': expected 2 to 10 options"),
        (
            "arc_easy",
            {**ARC_NESTED, "choices": {"text": ["a", "b"], "label": ["A", "A"]}},
            "expected 2 different labels, one for each option",
        ),
        ("arc_easy", {"question": "?", "answerKey": "A"}, "no column 'choices', which task arc_easy reads"),
        ("arc_easy_likelihood", {**ARC_NESTED, "choices": ["a", " "]}, "field 'choices': expected 2 to 10 options"),
        ("mmlu", {**MMLU, "answer": 4}, "label of one of the options (A, B, C, D); found 4"),
        ("mmlu", {**MMLU, "answer": True}, "label of one of the options (A, B, C, D); found True"),
    ],
)
def test_a_row_that_is_no_item_is_named(task: str, values: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as caught:
        item(task, values)
    assert str(caught.value).startswith("rows.jsonl, line 7")
    assert expected in str(caught.value)


def arc_labelled(labels: list[str]) -> dict[str, Any]:
    return {**ARC_NESTED, "choices": ["light", "sand"], "labels": labels, "answerKey": labels[0]}


@pytest.mark.parametrize("labels", [["0", "1"], ["K", "L"], ["yes", "no"], ["5", "6"], ["AB", "C"], ["\u0131", "a"]])
def test_labels_that_the_reader_of_choices_cannot_see_are_refused(labels: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        item("arc_easy", arc_labelled(labels))
    assert str(caught.value) == (
        "rows.jsonl, line 7, field 'labels': expected labels that are read from answers, each one of A to J, a to j or "
        f"1 to 5; found {labels!r}"
    )
    nested = {"text": ["light", "sand"], "label": labels}
    with pytest.raises(UserError, match="field 'choices': expected labels that are read from answers"):
        item("arc_easy", {**ARC_NESTED, "choices": nested, "answerKey": labels[0]})
    # What is not read but scored may have any label.
    assert item("arc_easy_likelihood", arc_labelled(labels)).option_labels == labels


@pytest.mark.parametrize("task", ["arc_easy", "arc_easy_likelihood"])
def test_labels_differ_in_more_than_case(task: str) -> None:
    with pytest.raises(UserError, match=r"field 'labels': expected 2 different labels, .*; found \['a', 'A'\]"):
        item(task, arc_labelled(["a", "A"]))


@pytest.mark.parametrize("label", [*"ABCDEFGHIJabcdefghij12345"])
def test_every_label_that_is_taken_is_read(label: str) -> None:
    other = "3" if label == "2" else "2"
    found = item("arc_easy", arc_labelled([label, other]))
    extracted = extract(load_task("arc_easy"), f"The answer is {label}.", found.option_labels, found.option_texts)
    assert verdict(extracted, found.answer) == "correct"


@pytest.mark.parametrize("task", ["arc_easy", "arc_easy_likelihood"])
@pytest.mark.parametrize("nested", [True, False])
def test_half_a_surrogate_pair_in_an_option_or_label_is_named(task: str, nested: bool) -> None:
    for texts, labels, field in (
        (["light", "s\ud83d"], ["A", "B"], "choices"),
        (["a", "b"], ["A", "\ud83d"], "labels"),
    ):
        options: dict[str, Any] = (
            {"choices": {"text": texts, "label": labels}} if nested else {"choices": texts, "labels": labels}
        )
        with pytest.raises(UserError) as caught:
            item(task, {**ARC_NESTED, **options})
        where = "choices" if nested else field
        message = f"rows.jsonl, line 7, field {where!r}: expected Unicode text, found a lone surrogate at character "
        assert str(caught.value).startswith(message)


def test_a_column_that_the_template_lacks_is_named(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text(json.dumps({"query": "How many?", "answer": "#### 3"}))
    with pytest.raises(UserError, match=r"rows\.jsonl, line 1: no column 'question', which question_template uses"):
        list(read_items(load_task("gsm8k"), find_files(f"{tmp_path}/rows.jsonl"), None))


@given(st.integers() | st.decimals(allow_nan=False, allow_infinity=False, places=3).map(str), st.booleans())
def test_any_number_is_read_back_from_an_answer(number: Any, marked: bool) -> None:
    text = f"So it is 7 in all.\n#### {number}" if marked else number
    assert Fraction(item("gsm8k", {"question": "?", "answer": text}).answer) == Fraction(number)


@given(st.integers(2, len(LETTERS)), st.data())
def test_every_option_can_be_the_answer(count: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, count - 1))
    found = item("mmlu", {**MMLU, "choices": [f"option {number}" for number in range(count)], "answer": index})
    assert found.answer == LETTERS[index]
    assert found.option_texts[found.option_labels.index(found.answer)] == f"option {index}"


@pytest.mark.parametrize(
    ("task", "response", "answer", "expected"),
    [
        ("gsm8k", "5 + 3 = 8. The answer is 1,206.", "1206", ("1206", "correct")),
        ("gsm8k", "The answer is 0.75.", "3/4", ("3/4", "correct")),
        ("gsm8k", "The answer is 12.", "18", ("12", "wrong")),
        ("gsm8k", "I do not know.", "18", (None, "no_answer")),
        ("arc_easy", "Plants need light. The answer is A.", "A", ("A", "correct")),
        ("arc_easy", "The answer is 2.", "2", ("2", "correct")),
        ("arc_easy", "The answer is b.", "b", ("B", "correct")),
        ("arc_easy", "The answer is E.", "A", (None, "no_answer")),
        ("arc_easy", "The answer is a river.", "2", ("2", "correct")),
        ("arc_easy", "Plants are green.", "A", (None, "no_answer")),
    ],
)
def test_final_answers_are_compared_exactly(task: str, response: str, answer: str, expected: tuple) -> None:
    labels = ["A", "B", "C"] if answer.isalpha() else ["1", "2", "3"]
    extracted = extract(load_task(task), response, labels, ["bread", "a river", "tea"])
    assert (extracted, verdict(extracted, answer)) == expected


# Task files of one's own.


def own_task(directory: Path, **changes: Any) -> Path:
    values = yaml.safe_load((TASKS_DIRECTORY / "arc_easy.yaml").read_text())
    values = {name: value for name, value in {**values, "name": "mine", **changes}.items() if value is not ...}
    path = directory / "mine.yaml"
    path.write_text(yaml.safe_dump(values))
    return path


def test_a_task_file_of_ones_own_is_named_by_its_path(tmp_path: Path) -> None:
    assert load_task(str(own_task(tmp_path))).name == "mine"


@pytest.mark.parametrize(
    ("changes", "expected"),
    [
        ({"sampling": ...}, "kind generative needs sampling"),
        ({"continuation": "text"}, "kind generative has no continuation"),
        ({"kind": "likelihood"}, "kind likelihood needs continuation"),
        ({"options_column": ...}, "options_column: expected a column for this task"),
        ({"extraction": "number"}, "options_column: expected none for this task"),
        ({"metric": "accuracy_normalized"}, "kind generative has the metric accuracy alone"),
        ({"exemplars": "bundled:poems"}, "exemplars: expected a list of exemplars or bundled:word_problems"),
        ({"question_tmplate": "x"}, "question_tmplate: unknown field; did you mean 'question_template'?"),
        ({"version": 0}, "version: Input should be greater than 0; found 0"),
        ({"name": "My Task"}, "name: "),
        ({"answer_column": ...}, "expected answer_column, found none"),
    ],
)
def test_a_wrong_task_file_is_named_with_its_field(tmp_path: Path, changes: dict[str, Any], expected: str) -> None:
    path = own_task(tmp_path, **changes)
    with pytest.raises(UserError) as caught:
        load_task(str(path))
    assert str(caught.value).startswith(f"evaluate.tasks: {path}: ")
    assert expected in str(caught.value)


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("arc_esy", "no task 'arc_esy'; did you mean 'arc_easy'?; expected one of arc_challenge, "),
        ("nowhere.yaml", "nowhere.yaml: cannot read the task file: No such file"),
    ],
)
def test_an_unknown_task_is_named(name: str, expected: str) -> None:
    with pytest.raises(UserError) as caught:
        load_task(name)
    assert expected in str(caught.value)


def test_the_prompt_hash_follows_what_makes_a_prompt_and_nothing_else(tmp_path: Path) -> None:
    def hash_of(**changes: Any) -> str:
        return load_task(str(own_task(tmp_path, **changes))).prompt_hash

    assert len(hash_of()) == 12
    assert hash_of() == hash_of(path="elsewhere.jsonl", version=9, name="other")
    exemplars = [{"question": "q", "answer": "a"}]
    others = [hash_of(question_template="{{ question }}!"), hash_of(system="Be short."), hash_of(exemplars=exemplars)]
    assert len({hash_of(), *others}) == 4
    assert isinstance(load_task("gsm8k"), Task)
