"""The Jinja2 templates of the prompts section: the question of a row, and the message that holds the context.

Every template runs in a sandbox and gives the same text whenever it is rendered: Jinja2's random functions are taken
away, because the check before the run and the read tasks must see the same prompts. Nothing here imports ray, torch
or vllm.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import jinja2
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError, brief
from mipo_ray.prompts.reading import SourceRow, missing_column, nearest
from mipo_ray.text.limited_templates import TemplateFailed, render, variables_of

DEFAULT_TEMPLATES = {"user": "{{ context }}\n\n{{ question }}", "system": "{{ context }}"}
# Filters that make text of whatever they are given.
TEXT_FILTERS = (
    *("capitalize", "center", "e", "escape", "format", "indent", "join", "lower", "replace", "string", "striptags"),
    *("title", "trim", "truncate", "upper", "urlize", "wordwrap"),
)
WHOLE_ROW = "row"  # the variable with all columns, for names that are no identifiers


def context_template_of(prompts: PromptsConfig) -> str:
    """The template of the message with the context: the configured one, or the default of `prompts.context_role`."""
    return DEFAULT_TEMPLATES[prompts.context_role] if prompts.context_template is None else prompts.context_template


def check_templates(prompts: PromptsConfig, section: str, *, needs_context: bool) -> None:
    """Raises UserError for a template that does not compile, names an unknown variable or drops what it must show.

    section: where `prompts` stands in the configuration, for messages. needs_context: the context template must use
    the context; otherwise matched and mismatched prompts would be the same.
    """
    if prompts.question_template is not None:
        template_variables(prompts.question_template, f"{section}.question_template")
    key = f"{section}.context_template"
    template = context_template_of(prompts)
    names = template_variables(template, key)
    if prompts.context_role == "system":
        if "question" in names:
            raise UserError(
                f"{key}: with {section}.context_role=system it makes the system message, which the question is no "
                f"part of; expected {{{{ context }}}} alone, found {brief(template)}"
            )
        known = ["context"]
    else:
        known = ["context", "question"]
    for name in sorted(names - set(known)):
        raise UserError(f"{key}: unknown variable {name!r}; expected {' and '.join(known)}{nearest(name, known)}")
    for name in known:
        if name not in names and (needs_context or name != "context"):
            raise UserError(f"{key}: expected the template to use {{{{ {name} }}}}, found {brief(template)}")


def check_question_columns(prompts: PromptsConfig, row: SourceRow) -> None:
    """Raises UserError naming file, row and variable when `prompts.question_template` uses a column the row lacks."""
    if prompts.question_template is not None:
        check_row_columns("question_template", prompts.question_template, row)


def check_row_columns(name: str, template: str, row: SourceRow) -> None:
    """Raises UserError naming file, row and variable when the template of this name uses a column the row lacks."""
    for variable in sorted(template_variables(template, name) - {WHOLE_ROW}):
        if variable not in row.values:
            raise missing_column(row, variable, f", which {name} uses")


def render_question(template: str, values: Mapping[str, Any]) -> str:
    """The text of the user message: `template` over the row's columns, and over `row`, a mapping of all of them.

    Raises UserError when the template fails, prints a null or gives an empty text.
    """
    return render_row("question_template", template, values)


def render_row(name: str, template: str, values: Mapping[str, Any]) -> str:
    """The text of the template of this name over a row's columns, as that of `render_question`; raises the same."""
    return render_template(name, template, {**values, WHOLE_ROW: values})


def render_context(prompts: PromptsConfig, context: str, question: str) -> str:
    """The text of the message with the context; raises UserError when the template fails or gives an empty text."""
    variables = {"context": context, "question": question} if prompts.context_role == "user" else {"context": context}
    return render_template("context_template", context_template_of(prompts), variables)


def render_template(name: str, template: str, variables: dict[str, Any]) -> str:
    """The text of a template; raises UserError, which begins with `name`, when it fails or gives an empty text."""
    try:
        text = render(_environment, (), template, variables)
    except TemplateFailed as error:  # the template is the user's program and may raise anything
        raise UserError(f"{name}: {error.shown}") from None
    if not text.strip():
        raise UserError(f"{name}: expected some text, found an empty string")
    return text


@functools.lru_cache(maxsize=8)
def template_variables(template: str, key: str) -> frozenset[str]:
    """The variables that a template expects to be given; raises UserError naming `key` where it does not compile."""
    try:
        names = variables_of(_environment, (), template)
    except TemplateFailed as error:
        where = key if error.line is None else f"{key}, line {error.line}"
        raise UserError(f"{where}: not a valid Jinja2 template: {error.message}") from None
    return frozenset(names - set(_environment().globals))


@functools.cache
def _environment() -> ImmutableSandboxedEnvironment:
    environment = ImmutableSandboxedEnvironment(
        undefined=jinja2.StrictUndefined, keep_trailing_newline=True, finalize=_refuse_null
    )
    environment.globals["zip"] = _zip
    for name in TEXT_FILTERS:
        environment.filters[name] = _without_nulls(environment.filters[name])
    del environment.globals["lipsum"], environment.filters["random"]
    return environment


def _zip(*columns: Iterable[Any]) -> list[tuple[Any, ...]]:
    """Labels and texts of different lengths are broken data, so lengths must agree."""
    return list(zip(*columns, strict=True))


def _refuse_null(value: Any) -> Any:
    # Jinja2 would print the words None and nan into the prompt.
    if value is None or value != value or (isinstance(value, list | tuple) and any(part is None for part in value)):
        where = "a list with null" if isinstance(value, list | tuple) else "null"
        raise UserError(f"expected text where the template prints a value, found {where}")
    return value


def _without_nulls(text_filter: Callable[..., Any]) -> Callable[..., Any]:
    """A filter of Jinja2 that refuses null, of which it would make text."""
    place = int(hasattr(text_filter, "jinja_pass_arg"))  # some are given the environment first

    @functools.wraps(text_filter)
    def refusing(*arguments: Any, **options: Any) -> Any:
        before, value, rest = arguments[:place], arguments[place], arguments[place + 1 :]
        value = list(value) if isinstance(value, Iterator) else value  # what other filters hand on
        return text_filter(*before, _refuse_null(value), *rest, **options)

    return refusing
