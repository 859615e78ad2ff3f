"""Templates of others: what they may take of time and memory, and that the limits change nothing else.

python -m pytest tests/unit/text/test_limited_templates.py
"""

from __future__ import annotations

import datetime
import decimal
import os
import signal
import subprocess
import sys
import threading
from typing import Any

import jinja2
import psutil
import pytest
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mipo_ray.errors import UserError
from mipo_ray.models.chat_template import ChatTemplate, TemplateTooCostly
from mipo_ray.prompts.templates import render_question, template_variables
from mipo_ray.text import limited_templates
from mipo_ray.text.limited_templates import LimitPassed, TemplateFailed, render, variables_of

# Each passes a limit by another way; sizes are such that an unlimited one would not end or would take all memory.
BOMBS = {
    "a product": "{{ 'a' * 10**10 }}",
    "a power": "{{ (10 ** (10 ** 9)) | string | length }}",
    "a filter": "{{ 'a' | center(10**10) }}",
    "a filter of a constant": "{{ 'a' | center(10000000000) }}",
    "a filter of lines": "{{ ('a\\n' * 10**6) | indent(100000) }}",
    "a method": "{{ question.ljust(10**10) }}",
    "a format": "{{ '%010000000000d' % 1 }}",
    "a format method": "{{ '{:>10000000000}'.format(1) }}",
    "a replacement": "{% set a = 'a' * 10**6 %}{{ a.replace('a', a) }}",
    "a list": "{{ ([0] * 10**10) | length }}",
    "a batch": "{{ [1] | batch(10**10, 'x') | list | length }}",
    "loops in loops": "{% set r = range(99999) %}{% for a in r %}{% for b in r %}{% for c in r %}{% endfor %}"
    "{% endfor %}{% endfor %}{{ question }}",
    "a doubled text": "{% set n = namespace(x='ab') %}{% for i in range(90) %}{% set n.x = n.x ~ n.x %}"
    "{% endfor %}{{ n.x }}",
    "a long text": "{% for i in range(90000) %}{{ question * 1000 }}{% endfor %}",
}


@pytest.fixture(autouse=True)
def _short_time(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_templates, "CPU_SECONDS", 1.0)


@pytest.mark.parametrize("bomb", BOMBS)
def test_a_question_template_passes_a_limit_and_is_named(bomb: str) -> None:
    with pytest.raises(UserError, match=r"^question_template: the template takes more than"):
        render_question(BOMBS[bomb], {"question": "what?"})


@pytest.mark.parametrize("bomb", ["a product", "a filter of a constant", "loops in loops"])
def test_a_chat_template_passes_a_limit_and_is_named(bomb: str) -> None:
    text = "{% for m in messages %}{% set question = m.content %}" + BOMBS[bomb] + "{% endfor %}"
    template = ChatTemplate("here/tokenizer_config.json", text, {}, ())
    with pytest.raises(TemplateTooCostly, match=r"^here/tokenizer_config\.json: the template takes more than"):
        template.render([{"role": "user", "content": "what?"}], {})


def test_the_check_before_anything_starts_has_the_limits_too() -> None:
    # Jinja2 computes what is constant when it compiles, and leaves for later what fails.
    assert template_variables(BOMBS["a filter of a constant"], "prompts.question_template") == frozenset()
    with pytest.raises(UserError, match=r"prompts\.question_template.*(recursion|nested)"):
        template_variables("{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}", "prompts.question_template")


def _environment() -> jinja2.Environment:
    return ImmutableSandboxedEnvironment(undefined=jinja2.StrictUndefined)


ROWS: list[tuple[str, dict[str, Any]]] = [
    ("{{ a }} and {{ b.c }}{% if d is defined and d == 'x' %}!{% endif %}", {"a": 1, "b": {"c": "two"}, "d": "x"}),
    (
        "{% for x in xs %}{{ loop.index }}{{ x.label }} {% endfor %}",
        {"xs": [{"label": "A"}, {"label": "\u00e9\ud83d"}]},
    ),
    ("{{ day.year }} {{ price + price }}", {"day": datetime.date(2024, 7, 26), "price": decimal.Decimal("1.10")}),
    ("{% macro m(x) %}<{{ x }}>{% endmacro %}{{ m(a) | upper }}{{ raw }}", {"a": "b", "raw": b"\xff"}),
]


@pytest.mark.parametrize(("text", "variables"), ROWS)
def test_within_the_limits_the_text_is_the_same_as_without(text: str, variables: dict[str, Any]) -> None:
    assert render(_environment, (), text, variables) == _environment().from_string(text).render(variables)


def test_what_only_prints_values_is_rendered_in_this_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(limited_templates, "_process", lambda: pytest.fail("another process was asked"))
    assert render(_environment, (), ROWS[0][0], ROWS[0][1]) == "1 and two!"
    assert render_question("{{ question }}{% if row %}?{% endif %}", {"question": "so"}) == "so?"


def test_what_only_prints_values_has_the_limit_of_length_too() -> None:
    with pytest.raises(UserError, match=r"^question_template: the template takes more than 20,000,000 characters"):
        render_question("{{ question }}" * 3000, {"question": "x" * 10**6})


def test_what_is_long_to_read_is_read_by_the_other_process(monkeypatch: pytest.MonkeyPatch) -> None:
    text = "{{ a }}" + " " * limited_templates.LONGEST_READ_HERE
    assert render(_environment, (), text, {"a": "b"}) == _environment().from_string(text).render({"a": "b"})
    assert variables_of(_environment, (), text) == {"a"}
    monkeypatch.setattr(limited_templates, "_process", lambda: pytest.fail("another process was asked"))
    with pytest.raises(pytest.fail.Exception):
        render(_environment, (), text, {"a": "b"})


def test_what_a_template_raises_arrives_with_its_name() -> None:
    with pytest.raises(TemplateFailed) as failed:
        render(_environment, (), "{% for x in xs %}{{ x + 1 }}{% endfor %}", {"xs": "ab"})
    assert failed.value.shown.startswith("TypeError: can only concatenate str")
    with pytest.raises(TemplateFailed) as failed:
        variables_of(_environment, (), "\n{{ a | nosuchfilter }}")
    assert failed.value.line == 2
    with pytest.raises(UserError, match=r"^question_template: expected text .* found null"):
        render_question("{% for x in xs %}{{ x }}{% endfor %}", {"xs": [None]})


def test_after_a_limit_and_after_a_kill_the_next_template_is_rendered() -> None:
    text = "{{ 'a' * 3 }}"
    with pytest.raises(LimitPassed):
        render(_environment, (), BOMBS["a product"], {})
    assert render(_environment, (), text, {}) == "aaa"
    process = limited_templates._process()._process
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert render(_environment, (), text, {}) == "aaa"


def test_threads_share_the_other_process() -> None:
    results: dict[int, str] = {}

    def work(number: int) -> None:
        results[number] = "".join(render(_environment, (), "{{ 'a' * n }}", {"n": number}) for _ in range(20))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(1, 6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {number: "a" * number * 20 for number in range(1, 6)}


def test_the_other_process_ends_with_this_one() -> None:
    code = (
        "from mipo_ray.prompts.templates import render_question\n"
        "from mipo_ray.text import limited_templates\n"
        "render_question(\"{{ 'a' * 3 }}\", {})\n"
        "print(limited_templates._process()._process.pid)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    pid = int(done.stdout)
    psutil.wait_procs([psutil.Process(pid)] if psutil.pid_exists(pid) else [], timeout=20)
    assert not psutil.pid_exists(pid)
