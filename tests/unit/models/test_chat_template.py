"""A chat template from a model's files: it renders what transformers renders, and never today's date.

python -m pytest tests/unit/models/test_chat_template.py
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mipo_ray.config.prompts import ChatSettings
from mipo_ray.errors import UserError
from mipo_ray.generation.rendering import chat_template_of, render_text
from mipo_ray.models.chat_template import ChatTemplate, ChatTemplateError, read_chat_template
from tests.helpers.chat_templates import ALTERNATING, BROKEN, DATED, LOSING, NO_SYSTEM, THINKING, WHOLE
from tests.helpers.tiny_model import END, PAD, START, make_tokenizer

TEMPLATES = {**WHOLE, **LOSING, **DATED, "thinking": THINKING}
MESSAGES = st.lists(
    st.fixed_dictionaries({"role": st.sampled_from(["system", "user", "assistant"]), "content": st.text(max_size=40)}),
    min_size=1,
    max_size=5,
)


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer()


@given(name=st.sampled_from(sorted(TEMPLATES)), messages=MESSAGES, thinking=st.sampled_from([None, True, False]))
def test_it_renders_what_the_tokenizer_renders(
    tokenizer: Any, name: str, messages: list[dict[str, str]], thinking: bool | None
) -> None:
    arguments = {"date_string": "3 Mar 2025"} | ({} if thinking is None else {"enable_thinking": thinking})
    tokenizer.chat_template = TEMPLATES[name]
    template = chat_template_of(tokenizer, "tiny")
    assert template is not None
    assert template.render(messages, arguments) == render_text(tokenizer, messages, ChatSettings(arguments))


@pytest.mark.parametrize("template", [NO_SYSTEM, ALTERNATING, BROKEN])
def test_what_a_template_refuses_is_an_error_with_its_own_message(template: str) -> None:
    messages = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    with pytest.raises(ChatTemplateError, match=r"(System role not supported|must alternate|has no attribute)"):
        ChatTemplate("tiny", template, {}, ()).render(messages, {})


def test_it_is_read_from_either_file_with_the_tokens_of_the_tokenizer(tmp_path: Path, tokenizer: Any) -> None:
    tokenizer.chat_template = WHOLE["chatml"]
    tokenizer.save_pretrained(tmp_path)
    read = read_chat_template(str(tmp_path))
    assert read is not None
    assert read.shown == f"{tmp_path}/chat_template.jinja"
    assert read.text == WHOLE["chatml"]
    assert {END, START, PAD} <= set(read.control_tokens)
    assert read.special_tokens["eos_token"] == END

    (tmp_path / "chat_template.jinja").unlink()
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    named = [{"name": "tools", "template": "no"}, {"name": "default", "template": "yes"}]
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": named}))
    read = read_chat_template(str(tmp_path))
    assert read is not None
    assert (read.shown, read.text) == (f"{tmp_path}/tokenizer_config.json", "yes")


def test_added_tokens_that_the_template_writes_are_control_tokens_and_other_ones_are_not(tmp_path: Path) -> None:
    added = [
        {"id": 0, "content": "<s>", "special": True},
        {"id": 1, "content": "<turn>", "special": False},
        {"id": 2, "content": "<h1>", "special": False},
        {"id": 3, "content": "\n", "special": False},
    ]
    (tmp_path / "tokenizer.json").write_text(json.dumps({"added_tokens": added}))
    (tmp_path / "chat_template.jinja").write_text("<turn>{{ messages[0].content }}\n")
    read = read_chat_template(str(tmp_path))
    assert read is not None
    assert read.control_tokens == ("<s>", "<turn>")


def test_a_model_that_was_not_downloaded_has_no_template_yet() -> None:
    assert read_chat_template("nobody/nothing-of-the-kind") is None


def test_a_template_that_does_not_compile_is_told_with_file_and_line() -> None:
    with pytest.raises(UserError, match=r"model/chat_template\.jinja, line 2: not a valid chat template"):
        _ = ChatTemplate("model/chat_template.jinja", "\n{% for %}", {}, ()).variables
