"""Which tokens end an answer and which have no place in one, read from a model's files and its chat template.

python -m pytest tests/unit/generation/test_turn_tokens.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.generation.turn_tokens import TurnTokens, turn_tokens
from mipo_ray.models.chat_template import ChatTemplate, end_of_turn, read_chat_template
from tests.helpers.chat_templates import ALTERNATING, ONE_TURN, WHOLE
from tests.helpers.tiny_model import CHAT_TEMPLATE, END, PAD, START, make_tokenizer

CONTROL = (END, START, PAD, "</s>", "<|user|>", "<|bot|>", "<turn")
LOOP = "{% for m in messages %}"
OPEN_END = LOOP + "<|im_start|>{{ m.role }}\n{{ m.content }}{% if not loop.last %}<|im_end|>\n{% endif %}{% endfor %}"


@pytest.mark.parametrize(
    ("template", "expected"),
    [
        (CHAT_TEMPLATE, END),
        (ALTERNATING, END),
        (WHOLE["trimming"], END),
        (OPEN_END, END),
        # As Llama 2 writes it, with a space before, and Zephyr, with a line end.
        (LOOP + "{{ m.content }}{{ ' </s>' if m.role != 'user' else ' [/INST]' }}{% endfor %}", "</s>"),
        (LOOP + "<|{{ 'user' if m.role == 'user' else 'bot' }}|>\n{{ m.content }}\n</s>\n{% endfor %}", "</s>"),
        # The longest of those that begin alike.
        (LOOP + "{{ m.content }}<turn|><|im_end|>{% endfor %}", "<turn"),
        # What begins the next turn ends none; text is no token.
        (LOOP + "<|{{ 'user' if m.role == 'user' else 'bot' }}|>\n{{ m.content }}\n{% endfor %}", None),
        (LOOP + "### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}", None),
        (ONE_TURN, None),
    ],
)  # fmt: skip
def test_the_end_of_a_turn_is_what_the_template_writes_there(template: str, expected: str | None) -> None:
    assert end_of_turn(ChatTemplate("t.jinja", template, {}, CONTROL), {}) == expected


def saved(directory: Path, tokenizer: Any, config: dict[str, Any], generation: dict[str, Any] | None = None) -> str:
    tokenizer.save_pretrained(directory)
    (directory / "config.json").write_text(json.dumps({"model_type": "llama", **config}))
    if generation is not None:
        (directory / "generation_config.json").write_text(json.dumps(generation))
    return str(directory)


def with_end_of_text(template: str = CHAT_TEMPLATE) -> Any:
    """A tokenizer whose end token is <|pad|>, while its template ends turns with <|im_end|>."""
    tokenizer = make_tokenizer(template)
    tokenizer.eos_token = PAD
    return tokenizer


def test_an_end_of_turn_that_the_files_do_not_name_is_added(tmp_path: Path) -> None:
    tokenizer = with_end_of_text()
    end, start, pad = tokenizer.convert_tokens_to_ids([END, START, PAD])
    found = turn_tokens(tokenizer, saved(tmp_path, tokenizer, {"eos_token_id": pad}), ChatSettings({}))
    assert found == TurnTokens(frozenset({pad, end}), (end,), frozenset({pad, end, start}))


@pytest.mark.parametrize(
    "files", [({"eos_token_id": 1}, None), ({}, {"eos_token_id": [2, 1]}), ({}, {"eos_token_id": 1})]
)
def test_one_that_they_name_is_not_added_again(files: tuple[Any, Any], tmp_path: Path) -> None:
    tokenizer = with_end_of_text()
    assert tokenizer.convert_tokens_to_ids(END) == 1
    found = turn_tokens(tokenizer, saved(tmp_path, tokenizer, *files), ChatSettings({}))
    assert (found.added, found.ends) == ((), frozenset({1, 2}))


def test_the_generation_config_goes_before_the_models_own(tmp_path: Path) -> None:
    tokenizer = with_end_of_text()
    found = turn_tokens(
        tokenizer, saved(tmp_path, tokenizer, {"eos_token_id": 1}, {"eos_token_id": 2}), ChatSettings({})
    )
    assert found.added == (1,)


def test_the_tiny_model_needs_none(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    found = turn_tokens(tokenizer, saved(tmp_path, tokenizer, {"eos_token_id": 1}), ChatSettings({}))
    assert (found.added, found.ends) == ((), frozenset({1}))


@pytest.mark.parametrize(
    ("token_ids", "count"),
    [([7, 8, 1], 0), ([7, 8], 0), ([7, 1, 8, 1], 1), ([0, 7, 2], 1), ([7, 0], 1), ([1, 1], 1), ([1], 0), ([], 0)],
)
def test_control_tokens_inside_an_answer_are_counted_without_its_end(token_ids: list[int], count: int) -> None:
    assert TurnTokens(frozenset({1, 2}), (), frozenset({0, 1, 2})).inside(token_ids) == count


def test_thoughts_are_a_part_of_an_answer_and_turns_are_not(tmp_path: Path) -> None:
    template = CHAT_TEMPLATE + "{% if add_generation_prompt %}{{ '<think>' }}{% endif %}{# <tool_call> #}"
    tokenizer = make_tokenizer("<turn>" + template)
    tokenizer.add_tokens(["<think>", "</think>", "<tool_call>", "<turn>"])
    tokenizer.add_special_tokens({"additional_special_tokens": [START, "<|thought|>", "<|python_tag|>"]})
    found = turn_tokens(tokenizer, saved(tmp_path, tokenizer, {}), ChatSettings({}))
    names = set(tokenizer.convert_ids_to_tokens(sorted(found.control)))
    assert names == {END, START, PAD, "<turn>", "<|python_tag|>"}


def test_the_files_alone_tell_the_same_for_the_plan(tmp_path: Path) -> None:
    tokenizer = with_end_of_text()
    read = read_chat_template(saved(tmp_path, tokenizer, {}, {"eos_token_id": [0]}))
    assert read is not None
    assert (end_of_turn(read, {}), read.end_tokens) == (END, (START, PAD))
