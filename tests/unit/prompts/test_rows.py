"""One row of a prompt file becomes one prompt row, or a message that names file, row and field."""

from __future__ import annotations

import datetime
import json
from typing import Any

import pytest

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import PromptRow, normalize_row, with_context


def normalized(values: dict[str, Any], **config: Any) -> PromptRow:
    return normalize_row(SourceRow("a.jsonl, line 3", "a.jsonl:3", values), PromptsConfig(**config))


def refused(values: dict[str, Any], **config: Any) -> str:
    with pytest.raises(UserError) as error:
        normalized(values, **config)
    return str(error.value)


def user(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


SYSTEM = {"role": "system", "content": "Be brief."}


def test_a_string_becomes_a_user_message_and_the_context_joins_it() -> None:
    row = normalized({"prompt": "What now?", "context": "I ski.", "group": "u1", "prompt_id": "p1"})
    assert row == PromptRow(
        prompt_id="p1",
        messages=[user("I ski.\n\nWhat now?")],
        question_messages=[user("What now?")],
        context="I ski.",
        group="u1",
        text='[["user", "I ski. What now?"]]',
        reference="",
        extra="{}",
    )


def test_optional_columns_may_be_absent_null_or_empty() -> None:
    absent = normalized({"prompt": "What now?"})
    assert (absent["prompt_id"], absent["context"], absent["group"]) == ("a.jsonl:3", "", "")
    assert absent["messages"] == absent["question_messages"] == [user("What now?")]
    assert normalized({"prompt": "What now?", "context": None, "group": None, "prompt_id": None}) == absent
    assert normalized({"prompt": "What now?", "context": " \n", "group": ""}) == absent


def test_a_reference_is_text_or_a_number_and_nothing_else_is_one() -> None:
    assert normalized({"prompt": "x", "reference": "Do this."})["reference"] == "Do this."
    assert normalized({"prompt": "x", "answer": 42}, reference_column="answer")["reference"] == "42"
    for value in (None, "", "  ", ["a"], {"a": 1}, True):
        assert normalized({"prompt": "x", "reference": value})["reference"] == ""


def test_integers_serve_as_ids_and_groups() -> None:
    row = normalized({"prompt": "x", "prompt_id": 7, "group": 0})
    assert (row["prompt_id"], row["group"]) == ("7", "0")


def test_a_conversation_keeps_its_turns_and_the_context_joins_the_last() -> None:
    turns = [user("Hello"), {"role": "assistant", "content": "Hi"}]
    row = normalized(
        {"prompt": [*turns, user("What now?")], "context": "I ski."}, context_template="{{question}} ({{context}})"
    )
    assert row["messages"] == [*turns, user("What now? (I ski.)")]
    assert row["question_messages"] == [*turns, user("What now?")]


def test_the_system_message_goes_before_prompts_that_have_none() -> None:
    assert normalized({"prompt": "x"}, system="Be brief.")["messages"] == [SYSTEM, user("x")]
    assert normalized({"prompt": "x"}, system="Be brief.")["question_messages"] == [SYSTEM, user("x")]
    assert normalized({"prompt": [SYSTEM, user("x")]}, system="Be long.")["messages"] == [SYSTEM, user("x")]


def test_white_space_makes_no_other_prompt_but_words_turns_and_roles_do() -> None:
    def text(prompt: Any, **config: Any) -> str:
        return normalized({"prompt": prompt}, **config)["text"]

    assert text("What  now?\n") == text("What now?")
    different = [
        text("What now?"),
        text("what now?"),
        text("What now?", system="Be brief."),
        text([user("What"), user("now?")]),
    ]
    assert len(set(different)) == len(different)


def test_other_columns_ride_along_as_json() -> None:
    row = normalized({"prompt": "x", "answer": 42, "day": datetime.date(2020, 1, 2), "nothing": None, "tags": ["a"]})
    assert json.loads(row["extra"]) == {"answer": 42, "day": "2020-01-02", "tags": ["a"]}


def test_keys_that_a_table_fills_with_null_are_no_keys() -> None:
    assert normalized({"prompt": [{**user("x"), "name": None}]})["messages"] == [user("x")]


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"promt": "x", "n": 1}, "no column 'prompt'; the row has the columns: promt, n; did you mean 'promt'?"),
        ({}, "no column 'prompt'; the row has the columns: none"),
        ({"prompt": 5}, "field 'prompt': expected a string or a list of {role, content} messages, found int 5"),
        ({"prompt": None}, "field 'prompt': expected a string or a list of {role, content} messages, found null"),
        ({"prompt": " \n"}, "field 'prompt': expected a prompt, found an empty string"),
        ({"prompt": "\ud800"}, "field 'prompt': expected Unicode text, found a lone surrogate at character 0"),
        ({"prompt": []}, "field 'prompt': expected at least one chat message, found an empty list"),
        ({"prompt": ["x"]}, "field 'prompt', message 0: expected {role, content}, found str 'x'"),
        (
            {"prompt": [{"role": "robot", "content": "x"}]},
            "message 0: expected a role of system, user, assistant; found str 'robot'",
        ),
        ({"prompt": [{"content": "x"}]}, "message 0: expected a role of system, user, assistant; found null"),
        (
            {"prompt": [user("x"), {"role": "user", "content": [1]}]},
            "message 1: expected a string as content, found list [1]",
        ),
        ({"prompt": [{**user("x"), "name": "y"}]}, "message 0: expected only role and content, found name"),
        (
            {"prompt": [user("x"), {"role": "assistant", "content": "y"}]},
            "expected the last message to be the user's, found role 'assistant'",
        ),
        ({"prompt": [user("")]}, "field 'prompt': expected a prompt, found an empty string"),
        ({"prompt": "x", "context": 5}, "field 'context': expected a string, found int 5"),
        ({"prompt": "x", "group": 1.5}, "field 'group': expected a string or an integer, found float 1.5"),
        ({"prompt": "x", "group": True}, "field 'group': expected a string or an integer, found bool True"),
        ({"prompt": "x", "prompt_id": ["y"]}, "field 'prompt_id': expected a string or an integer, found list ['y']"),
        ({"prompt": "x", "prompt_id": ""}, "field 'prompt_id': expected a unique id, found an empty string"),
    ],
)
def test_what_is_wrong_with_a_row(values: dict[str, Any], expected: str) -> None:
    message = refused(values)
    assert message.startswith("a.jsonl, line 3")
    assert expected in message


def test_columns_have_the_names_of_the_configuration() -> None:
    config = {"column": "q", "context_column": "who", "group_column": "team", "id_column": "key"}
    row = normalized({"q": "What?", "who": "I ski.", "team": "t", "key": "k", "prompt": "other"}, **config)
    assert (row["prompt_id"], row["context"], row["group"]) == ("k", "I ski.", "t")
    assert json.loads(row["extra"]) == {"prompt": "other"}


EXEMPLARS = ({"question": "1 + 1?", "answer": "2"}, {"question": "1 + 2?", "answer": "3"})
SHOTS = [
    user("1 + 1?"),
    {"role": "assistant", "content": "2"},
    user("1 + 2?"),
    {"role": "assistant", "content": "3"},
]


def test_exemplars_stand_between_system_message_and_turns() -> None:
    plain = normalized({"prompt": "2 + 2?", "context": "I ski."}, exemplars=EXEMPLARS, system="Be brief.")
    assert plain["question_messages"] == [SYSTEM, *SHOTS, user("2 + 2?")]
    assert plain["messages"] == [SYSTEM, *SHOTS, user("I ski.\n\n2 + 2?")]
    turns = [user("Hello"), {"role": "assistant", "content": "Hi"}, user("2 + 2?")]
    assert normalized({"prompt": [SYSTEM, *turns]}, exemplars=EXEMPLARS)["messages"] == [SYSTEM, *SHOTS, *turns]
    assert normalized({"prompt": turns}, exemplars=EXEMPLARS)["messages"] == [*SHOTS, *turns]


@pytest.mark.parametrize("system", [None, "Be brief."])
def test_the_system_role_puts_the_context_behind_what_users_share(system: str | None) -> None:
    row = normalized(
        {"prompt": "What now?", "context": "I ski."}, context_role="system", system=system, exemplars=EXEMPLARS
    )
    shared = [SYSTEM] if system else []
    assert row["question_messages"] == [*shared, *SHOTS, user("What now?")]
    content = "Be brief.\n\nI ski." if system else "I ski."
    assert row["messages"] == [{"role": "system", "content": content}, *SHOTS, user("What now?")]
    assert row["text"] != normalized({"prompt": "What now?"}, context_role="system", exemplars=EXEMPLARS)["text"]


def test_the_system_role_appends_to_the_system_message_that_a_row_brings() -> None:
    config = {"context_role": "system", "context_template": "User: {{ context }}", "system": "unused"}
    row = normalized({"prompt": [SYSTEM, user("What now?")], "context": "I ski."}, **config)
    assert row["messages"] == [{"role": "system", "content": "Be brief.\n\nUser: I ski."}, user("What now?")]
    prompts = PromptsConfig.model_validate(config)
    other = with_context(row["question_messages"], "I sail.", prompts)
    assert other == normalized({"prompt": [SYSTEM, user("What now?")], "context": "I sail."}, **config)["messages"]


ARC = {
    "id": "Mercury_1",
    "question": "Which is a liquid?",
    "choices": {"text": ["ice", "water"], "label": ["A", "B"]},
    "answerKey": "B",
    "hint": None,
}
ARC_TEMPLATE = (
    "{{ question }}{% for label, text in zip(choices.label, choices.text) %}\n{{ label }}. {{ text }}{% endfor %}"
    "{% if hint %}\n{{ hint }}{% endif %}"
)


def test_question_template_reads_nested_columns_and_leaves_all_of_them_in_extra() -> None:
    row = normalized(ARC, question_template=ARC_TEMPLATE, id_column="id")
    assert row["messages"] == [user("Which is a liquid?\nA. ice\nB. water")]
    assert row["prompt_id"] == "Mercury_1"
    assert json.loads(row["extra"]) == {name: ARC[name] for name in ("question", "choices", "answerKey")}
    templated = normalized({"prompt": "x", "the prompt": "y"}, question_template="{{ row['the prompt'] }} {{ prompt }}")
    assert templated["messages"] == [user("y x")]
    assert json.loads(templated["extra"]) == {"prompt": "x", "the prompt": "y"}


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ qestion }}", ": no column 'qestion', which question_template uses; the row has the columns: id, question"),
        ("{{ choices.txt }}", "UndefinedError: 'dict object' has no attribute 'txt'"),
        ("{{ question }} {{ hint }}", "question_template: expected text where the template prints a value, found null"),
        ("{{ zip(choices.label, ['A']) | length }}", "ValueError: zip() argument 2 is shorter than argument 1"),
        ("{{ question.__class__.__mro__ }}", "SecurityError"),
        ("{{ choices.text.append('x') }}", "SecurityError"),
        ("{% if hint %}{{ hint }}{% endif %}", "question_template: expected some text, found an empty string"),
    ],
)
def test_a_question_template_that_fails_on_a_row_names_it(template: str, expected: str) -> None:
    message = refused(ARC, question_template=template)
    assert message.startswith("a.jsonl, line 3: ")
    assert expected in message


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        ("{{ context.__class__.__mro__ }}{{ question }}", "SecurityError"),
        ("{{ context.name }}{{ question }}", "UndefinedError"),
        ("{{ context + 1 }}{{ question }}", "TypeError"),
        ("{% if not context %}{{ question }}{% endif %}", "expected some text, found an empty string"),
    ],
)
def test_a_template_that_fails_on_a_row_names_it(template: str, expected: str) -> None:
    message = refused({"prompt": "x", "context": "I ski."}, context_template=template)
    assert message.startswith("a.jsonl, line 3: context_template: ")
    assert expected in message


@pytest.mark.parametrize(
    "template",
    [
        "{{ value }}",
        "{{ value | upper }}",
        "{{ value | trim }}",
        "{{ value | string }}",
        "{{ values | join(', ') }}",
        "{{ values | map('string') | join }}",
        "{{ values | select('none') | join }}",
        "{{ values }}",
        "{{ row.value | replace('a', 'b') }}",
        "{{ text | float }}",
    ],
)
def test_what_is_missing_never_becomes_a_word_of_the_prompt(template: str) -> None:
    message = refused({"value": None, "values": ["a", None], "text": "nan"}, question_template=template)
    assert "expected text where the template prints a value, found" in message


def test_a_template_may_ask_whether_a_value_is_missing() -> None:
    template = "{% if value %}{{ value }}{% else %}nothing{% endif %}, {{ values | select | join('+') }}"
    row = normalized({"value": None, "values": ["a", None]}, question_template=template)
    assert row["messages"] == [user("nothing, a")]
    row = normalized({"value": 1.5, "values": ["a", 2]}, question_template=template)
    assert row["messages"] == [user("1.5, a+2")]
