"""What chat templates are written for: the Jinja2 environment that transformers gives them, without its clock.

A template renders here what it renders there, or fails with the same words; a test compares the two. Nothing here
imports torch or transformers, so that the process with limits starts at once.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Callable
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.utils
from jinja2.sandbox import ImmutableSandboxedEnvironment

from mipo_ray.text.dates import date_of


@functools.lru_cache(maxsize=4)
def chat_environment(date_string: str) -> ImmutableSandboxedEnvironment:
    """The environment of a chat template to which `strftime_now` tells the day that `date_string` names."""
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, jinja2.ext.loopcontrols]
    )
    environment.filters["tojson"] = _as_json
    environment.globals["raise_exception"] = _refuse
    environment.globals["strftime_now"] = _teller_of(date_string)
    environment.globals["dict"] = _Dictionaries()
    environment.globals["namespace"] = _Names
    return environment


class _Generation(jinja2.ext.Extension):
    """`{% generation %}`: marks the assistant's own text for trainers. Variables that are set inside stay inside."""

    tags = {"generation"}  # noqa: RUF012 (as Jinja2 declares it)

    def parse(self, parser: Any) -> jinja2.nodes.Node:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_inside"), [], [], body).set_lineno(line)

    def _inside(self, caller: Callable[[], str]) -> str:
        return caller()


class _Dictionaries:
    """`dict`, without what else the class has."""

    def __call__(self, *arguments: Any, **named: Any) -> dict[Any, Any]:
        return dict(*arguments, **named)

    def fromkeys(self, *arguments: Any) -> dict[Any, Any]:
        return dict.fromkeys(*arguments)


class _Names(jinja2.utils.Namespace):
    """`namespace`, which keeps nothing under names that begin with an underscore."""

    def __init__(*arguments: Any, **named: Any) -> None:  # a template may call a variable `self`
        self, *rest = arguments
        variables = dict(*rest, **named)
        for name in variables:
            _refuse_underscore(name)
        jinja2.utils.Namespace.__init__(self, variables)

    def __setitem__(self, name: str, value: Any) -> None:
        _refuse_underscore(name)
        super().__setitem__(name, value)


def _refuse_underscore(name: Any) -> None:
    if isinstance(name, str) and name.startswith("_"):
        raise jinja2.exceptions.SecurityError(
            f"Chat templates cannot store underscore-prefixed attributes on a namespace, but got {name!r}. "
            "Please rename the attribute."
        )


def _as_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _teller_of(date_string: str) -> Callable[[str], str]:
    def strftime_now(format: str) -> str:
        return date_of(date_string).strftime(format)

    return strftime_now


def _refuse(message: str) -> None:
    raise jinja2.TemplateError(message)
