"""Templates of the prompts section are checked before any row is read.

python -m pytest tests/unit/prompts/test_templates.py
"""

from __future__ import annotations

from typing import Any

import pytest

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.templates import check_templates, context_template_of


def check(needs_context: bool = True, **config: Any) -> None:
    check_templates(PromptsConfig(**config), "evaluate.prompts", needs_context=needs_context)


def test_the_default_template_depends_on_the_role() -> None:
    assert context_template_of(PromptsConfig()) == "{{ context }}\n\n{{ question }}"
    assert context_template_of(PromptsConfig(context_role="system")) == "{{ context }}"
    assert context_template_of(PromptsConfig(context_role="system", context_template="I: {{ context }}")) == (
        "I: {{ context }}"
    )
    for role in ("user", "system"):
        check(context_role=role)


@pytest.mark.parametrize(
    ("config", "expected"),
    [
        (
            {"context_template": "{{ contxt }} {{ question }}"},
            "context_template: unknown variable 'contxt'; expected context and question; did you mean 'context'?",
        ),
        ({"context_template": "{{ context }}"}, "context_template: expected the template to use {{ question }}"),
        ({"context_template": "{{ question }}"}, "context_template: expected the template to use {{ context }}"),
        (
            {"context_template": "a\n{% if context %} {{ question }}"},
            "context_template, line 2: not a valid Jinja2 template",
        ),
        (
            {"context_role": "system", "context_template": "{{ context }} {{ question }}"},
            "context_template: with evaluate.prompts.context_role=system it makes the system message, which",
        ),
        (
            {"context_role": "system", "context_template": "Be kind."},
            "context_template: expected the template to use {{ context }}",
        ),
        ({"question_template": "{{ question"}, "question_template, line 1: not a valid Jinja2 template"),
        (
            {"question_template": "a\n{{ choices | shuffle }}"},
            "question_template, line 2: not a valid Jinja2 template: No filter named 'shuffle'",
        ),
        (
            {"question_template": "{{ choices | random }}"},
            "question_template, line 1: not a valid Jinja2 template: No filter named 'random'",
        ),
    ],
)
def test_what_is_wrong_with_a_template(config: dict[str, Any], expected: str) -> None:
    with pytest.raises(UserError) as error:
        check(**config)
    assert str(error.value).startswith(f"evaluate.prompts.{expected}")


def test_templates_may_use_the_functions_of_jinja() -> None:
    check(context_template="{% for i in range(2) %}{{ context }}{% endfor %}{{ question }}")
    check(context_template="{{ question }}", needs_context=False)
    check(
        question_template="{% for label, text in zip(choices.label, choices.text) %}{{ label }}{{ text }}{% endfor %}"
    )
