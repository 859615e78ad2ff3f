"""What a chat template finds when it is rendered within limits: what transformers gives it, and nothing else.

python -m pytest tests/unit/models/test_chat_environment.py
"""

from __future__ import annotations

import datetime
from typing import Any

import jinja2
import pytest
from transformers.utils import chat_template_utils

from mipo_ray.generation.rendering import chat_template_of, render_turns
from mipo_ray.generation.thinking import template_marks
from mipo_ray.models import chat_template
from mipo_ray.models.chat_environment import chat_environment
from mipo_ray.models.chat_template import ChatTemplate, ChatTemplateError
from mipo_ray.text.dates import DATE_STRING, date_of
from tests.helpers.chat_templates import DATED, LOSING, THINKING, WHOLE
from tests.helpers.tiny_model import END, make_tokenizer

MESSAGES = [{"role": "system", "content": "Be kind, \u00e9."}, {"role": "user", "content": f" Hello\n{END}"}]

PROBES = {
    "json": "{{ messages | tojson }}{{ messages | tojson(true) }}{{ messages | tojson(false, 2) }}"
    "{{ messages | tojson(indent=4, sort_keys=true, separators=(',', ':')) }}",
    "json of nothing": "{{ nobody | tojson }}",
    "dictionaries": "{% set d = dict([('a', 1)], b=2) %}{{ d }}{{ dict.fromkeys('ab', 0) }}{{ dict(d, a=3) }}",
    "what dictionaries have": "{{ dict.keys is defined }}{{ dict.mro is defined }}{{ dict.fromkeys is callable }}"
    "{{ dict is mapping }}{{ dict is iterable }}",
    "wrong dictionaries": "{{ dict(1) }}",
    "namespaces": "{% set n = namespace({'a': 1}, self=2) %}{% set n.b = n.a + n.self %}{{ n }}{{ n.c is defined }}",
    "hidden names": "{% set n = namespace(_a=1) %}",
    "hidden names later": "{% set n = namespace() %}{% for m in messages %}{% set n._a = m %}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{% set inside = loop.index %}{{ inside }}{{ m.content }}"
    "{% endgeneration %}{{ inside is defined }}{% endfor %}",
    "leaving a generation": "{% for m in messages %}{% generation %}{% continue %}{% endgeneration %}{% endfor %}",
    "an open generation": "{% generation %}",
    "loops": "{% for m in messages %}{% if loop.last %}{% break %}{% endif %}{{ m.role }}{% endfor %}"
    "{% for m in messages recursive %}{{ loop.depth }}{% endfor %}",
    "lines": "\n  {% if true %}\n  a\n  {% endif %}\n{#- b #}\n  {{ 1 }}\n\n",
    "refusal": "{{ raise_exception('No, ' ~ messages[0].role) }}",
    "refusal of something else": "{{ raise_exception(none) }}",
    "no name": "{{ nobody }}{{ messages[7] }}{{ messages[0].missing }}{{ messages[0].keys is defined }}",
    "nothing of nothing": "{{ messages[7].role }}",
    "insides": "{{ raise_exception.__globals__ }}",
    "mutation": "{{ messages.append(1) }}",
    "a long range": "{{ range(100001) | list }}",
    "no number": "{{ 1 + messages }}",
    "no filter": "\n{{ 1 | nosuchfilter }}",
    "no syntax": "\n{% if %}",
    "the teller of the day": "{{ strftime_now is callable }}{{ strftime_now.name is defined }}{{ strftime_now.func is "
    "defined }}{{ strftime_now(format='%d.%-m.%Y, %A %%') }}",
    "variables": "{{ tools is none }}{{ documents is none }}{{ add_generation_prompt }}{{ eos_token }}{{ bos_token }}"
    "{{ conversation is defined }}{{ chat_template is defined }}{{ continue_final_message is defined }}"
    "{{ unk_token is defined }}{{ pad_token }}{{ additional_special_tokens is defined }}{{ kwargs is defined }}",
}
TEMPLATES = {**PROBES, **WHOLE, **LOSING, **DATED, "thinking": THINKING}


@pytest.fixture
def _same_day(monkeypatch: pytest.MonkeyPatch) -> None:
    fixed = type("datetime", (datetime.datetime,), {"now": lambda *_: date_of(DATE_STRING)})
    monkeypatch.setattr(chat_template_utils, "datetime", fixed)


def by_transformers(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=False))
    except Exception as error:
        return f"{type(error).__name__}: {error}"


def within_limits(tokenizer: Any, messages: list[dict[str, str]]) -> str:
    template = chat_template_of(tokenizer, "tiny")
    assert template is not None
    try:
        return template.render(messages, {})
    except ChatTemplateError as error:
        return str(error)


@pytest.mark.usefixtures("_same_day")
@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_makes_the_same_text_or_fails_with_the_same_words(name: str) -> None:
    tokenizer = make_tokenizer(TEMPLATES[name])
    assert within_limits(tokenizer, MESSAGES) == by_transformers(tokenizer, MESSAGES)


def test_the_environment_has_the_same_names_and_settings() -> None:
    own, theirs = chat_environment(DATE_STRING), chat_template_utils._compile_jinja_template("x").environment
    assert type(own) is type(theirs)
    for names in ("globals", "filters", "tests"):
        assert getattr(own, names).keys() == getattr(theirs, names).keys()
        same = [name for name, value in getattr(own, names).items() if value is getattr(theirs, names)[name]]
        assert getattr(own, names).keys() - same <= {"tojson", "raise_exception", "strftime_now", "dict", "namespace"}
    assert len(own.extensions) == len(theirs.extensions) == 2
    assert (own.undefined, own.finalize, own.autoescape) == (theirs.undefined, theirs.finalize, theirs.autoescape)
    assert own.lexer is theirs.lexer, "Jinja2 shares it among environments whose settings of syntax are equal"


@pytest.mark.parametrize("arguments", [{}, {"date_string": "3 Mar 2025", "enable_thinking": False, "eos_token": "!"}])
def test_the_variables_are_the_same_in_the_same_order(
    arguments: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    given: list[Any] = []

    class Template:
        def render(self, **variables: Any) -> str:
            given.append(variables)
            return ""

    monkeypatch.setattr(chat_template_utils, "_compile_jinja_template", lambda _: Template())
    monkeypatch.setattr(chat_template, "render", lambda *call: given.append(call[-1]) or "")
    tokenizer = make_tokenizer()
    tokenizer.apply_chat_template(MESSAGES, add_generation_prompt=True, tokenize=False, **arguments)
    template = chat_template_of(tokenizer, "tiny")
    assert template is not None
    template.render(MESSAGES, arguments)
    theirs, own = given
    assert own == theirs
    assert repr(own["messages"]) == repr(theirs["messages"])


def test_thoughts_have_the_names_that_transformers_gives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = make_tokenizer("{{ messages | tojson }}{{ add_generation_prompt }}")
    texts: list[str] = []

    def spied(tokenizer: Any, messages: Any) -> str:
        texts.append(tokenizer.apply_chat_template([dict(message) for message in messages], tokenize=False))
        texts.append(render_turns(tokenizer, messages))
        return texts[-1]

    monkeypatch.setattr("mipo_ray.generation.thinking.render_turns", spied)
    template_marks(tokenizer)
    assert texts[0] == texts[1]
    assert texts[0].count("pppthoughtppp") == 2


@pytest.mark.parametrize("name", TEMPLATES)
def test_literals_are_those_in_which_transformers_looks_for_control_tokens(name: str) -> None:
    text = TEMPLATES[name] + "{{ '\\x3cturn>' }}"
    try:
        theirs = set(chat_template_utils._get_template_literal_text(text).split("\0"))
    except (jinja2.TemplateError, SyntaxError):
        with pytest.raises(ChatTemplateError):
            _ = ChatTemplate("tiny", text, {}, ()).literals
    else:
        assert ChatTemplate("tiny", text, {}, ()).literals == theirs


def test_literals_of_a_template_that_only_prints_values() -> None:
    text = "<a>{{ messages }}\n{% if tools == '<b>' %}{{ 1 }}{% endif %}"
    assert ChatTemplate("tiny", text, {}, ()).literals == {"<a>", "\n", "<b>"}
