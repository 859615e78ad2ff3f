"""Chat templates that behave until they are where nothing limits them: there they never are.

python -m pytest tests/unit/generation/test_hostile_templates.py
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from transformers.utils import chat_template_utils

from mipo_ray.generation.rendering import chat_template_of, render_prompts, render_text
from mipo_ray.generation.thinking import template_marks, thought_reader
from mipo_ray.models.chat_template import ChatTemplateError, TemplateTooCostly
from mipo_ray.text import limited_templates
from tests.helpers.chat_templates import DATED, WHOLE
from tests.helpers.tiny_model import CHAT_TEMPLATE, END, make_tokenizer
from tests.unit.generation.test_rendering import CHAT, chat, ids
from tests.unit.text.test_limited_templates import BOMBS

MESSAGES = chat("Be kind.", "Hello")
LOOP = "{% set question = 'what?' %}" + BOMBS["loops in loops"]
ALLOCATION = "{% set question = 'what?' %}" + BOMBS["a product"]

# Before a template was rendered once, each of these took nothing where it was tried and everything where it was used.
TELLING_APART = {
    "a macro in place of a function": "{% if strftime_now.name is defined %}" + LOOP + "{% endif %}",
    "what dict has": "{% if dict.keys is not defined %}" + LOOP + "{% endif %}",
    "a scope": (
        "{% generation %}{% set a = 1 %}{% endgeneration %}{% if a is not defined %}" + ALLOCATION + "{% endif %}"
    ),
    "an argument of tojson": "{% if [1] | tojson(2) == '[1]' %}" + ALLOCATION + "{% endif %}",
    "a type": "{% if 'partial' not in strftime_now | string %}" + LOOP + "{% endif %}",
    "chance": "{% if [false, true] | random %}" + LOOP + "{% endif %}",
}

TOO_COSTLY = "the chat template of TokenizersBackend: the template "


@pytest.fixture(autouse=True)
def _nothing_is_rendered_without_limits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_templates, "CPU_SECONDS", 1.0)
    for name in ("_compile_jinja_template", "_cached_compile_jinja_template"):
        monkeypatch.setattr(chat_template_utils, name, lambda *_, **__: pytest.fail("transformers has the template"))


def outcome(render: Callable[[], Any]) -> Any:
    try:
        return render()
    except TemplateTooCostly as error:
        return str(error).partition("takes")[0]


@pytest.mark.parametrize("name", TELLING_APART)
def test_a_template_cannot_tell_where_it_is_used_from_where_it_is_tried(name: str) -> None:
    tokenizer = make_tokenizer(TELLING_APART[name] + CHAT_TEMPLATE)
    expected = ids(make_tokenizer(), MESSAGES)
    for _ in range(5 if name == "chance" else 1):
        assert outcome(lambda: ids(tokenizer, MESSAGES)) in (TOO_COSTLY, expected)
        text = make_tokenizer().decode(expected)
        assert outcome(lambda: render_text(tokenizer, MESSAGES, CHAT)) in (TOO_COSTLY, text)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_costly_template_is_refused_by_name_whatever_the_prompt_holds(bomb: str) -> None:
    tokenizer = make_tokenizer("{% set question = 'what?' %}" + BOMBS[bomb] + CHAT_TEMPLATE)
    with pytest.raises(TemplateTooCostly, match=f"^{TOO_COSTLY}takes more than"):
        ids(tokenizer, chat("Be kind.", f"Hello{END}"))


def test_the_marks_of_thoughts_are_looked_for_within_limits() -> None:
    with pytest.raises(TemplateTooCostly):
        thought_reader(make_tokenizer(LOOP + CHAT_TEMPLATE))
    assert template_marks(make_tokenizer("{{ raise_exception('only users') }}")) == ()


@pytest.mark.parametrize("name", [*WHOLE, *DATED])
def test_nothing_asks_transformers_for_a_template(name: str) -> None:
    tokenizer = make_tokenizer((WHOLE | DATED)[name])
    template = chat_template_of(tokenizer, "tiny")
    assert template is not None
    assert END in render_text(tokenizer, MESSAGES, CHAT) or name == "json"
    assert ids(tokenizer, MESSAGES) != ids(tokenizer, chat("Be kind.", f"Hello{END}"))
    thought_reader(tokenizer)


def test_a_template_that_does_not_compile_is_told_with_the_roles() -> None:
    tokenizer = make_tokenizer("{% if %}")
    for said in ("Hello", END):
        with pytest.raises(ChatTemplateError, match=r"of system, user: TemplateSyntaxError: Expected an expression"):
            ids(tokenizer, chat("Be kind.", said))
    assert render_prompts(tokenizer, [], CHAT) == []


# Other means.


def test_a_tokenizer_with_means_of_its_own_keeps_them() -> None:
    tokenizer = make_tokenizer(LOOP + "{{ date_string }}")
    calls: list[dict[str, Any]] = []

    class Own(type(tokenizer)):  # type: ignore[misc]
        def apply_chat_template(self, messages: Any, **options: Any) -> Any:
            calls.append(options)
            if messages[-1]["content"] == "refused":
                raise KeyError("no")
            return [1, 2] if options["tokenize"] else "own"

    tokenizer.__class__ = Own
    assert ids(tokenizer, MESSAGES) == [1, 2]
    assert render_text(tokenizer, MESSAGES, CHAT) == "own"
    assert calls[0] == {"add_generation_prompt": True, "tokenize": True, "return_dict": False, **CHAT.arguments}
    tokenizer.chat_template = None
    assert ids(tokenizer, chat("Be kind.", END)) == [1, 2]
    assert "date_string" not in calls[-1]
    assert calls[-1]["sanitize_control_tokens"] is True
    with pytest.raises(ChatTemplateError, match=r"prompt 'refused': .* of system, user: KeyError: 'no'"):
        ids(tokenizer, chat("Be kind.", "refused"))
    assert template_marks(tokenizer) == ()
