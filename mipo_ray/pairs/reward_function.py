"""A reward function of the user's own: found by its import path, and called as TRL's trainers call theirs. Pure."""

from __future__ import annotations

import hashlib
import importlib
import inspect
import json
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from numbers import Real
from typing import Any

from mipo_ray.errors import UserError, brief, cut
from mipo_ray.prompts.rows import PromptRow

KEY = "preference.function"

# What every call has, beside the other columns of the prompt file: see `RewardFunction.call`.
ALWAYS = ("prompts", "completions", "completion_ids", "prompt_id", "context", "group")

Rewards = list[float | None]


@dataclass(frozen=True)
class RewardFunction:
    """A reward function, and what it takes.

    source: a hash of its module's text. parameters: those that it names; takes_all: it takes all others too. columns:
    parameters without a default that are none of `ALWAYS`, and so must be columns of the prompts.
    """

    name: str
    source: str
    function: Any
    parameters: tuple[str, ...]
    takes_all: bool
    columns: tuple[str, ...]

    def watch(self, where: str, row: PromptRow) -> None:
        """Looks at a prompt row as it is checked; raises UserError where it lacks a column that the function needs."""
        extra = json.loads(row["extra"])
        for name in self.columns:
            if name not in extra:
                raise UserError(
                    f"{where}, field {name!r}: expected a value, which {KEY} {self.name} takes as the parameter "
                    f"{name!r} without a default; found none (columns that are no part of the prompt: "
                    f"{cut(', '.join(extra)) or 'none'})"
                )

    def rewards(self, rows: Sequence[Mapping[str, Any]]) -> list[Rewards]:
        """The reward of each of the responses of some sampled rows, row by row, by one call.

        By keyword, one entry for each response: `prompts` (chat messages), `completions` (a list with the assistant's
        message), `completion_ids` (token ids), `prompt_id`, `context`, `group`, and the other columns of the prompt
        file by their names, None where a row has no value. The function returns a number for each, or None for a
        response that it says nothing of; what is not finite counts as None.

        Raises UserError, naming the function and the first prompt of the call, for anything else and for what it
        raises.
        """
        responses = [(row, response) for row in rows for response in row["responses"]]
        if not responses:
            return [[] for _ in rows]
        where = f"{KEY} {self.name}, called with {len(responses)} responses from prompt {rows[0]['prompt_id']!r} on"
        try:
            returned = self.function(**self._arguments(responses))
        except Exception as error:
            raise UserError(f"{where}: raised {type(error).__name__}: {error}") from error
        values = _numbers(returned, len(responses), where)
        found, start = [], 0
        for row in rows:
            end = start + len(row["responses"])
            found.append(values[start:end])
            start = end
        return found

    def _arguments(self, responses: list[tuple[Mapping[str, Any], Any]]) -> dict[str, list[Any]]:
        extras = [json.loads(row["extra"]) for row, _ in responses]
        names = dict.fromkeys(name for extra in extras for name in extra)
        columns: dict[str, list[Any]] = {name: [extra.get(name) for extra in extras] for name in names}
        columns |= {
            "prompts": [row["messages"] for row, _ in responses],
            "completions": [[{"role": "assistant", "content": response["text"]}] for _, response in responses],
            "completion_ids": [response["token_ids"] for _, response in responses],
            **{name: [row[name] for row, _ in responses] for name in ("prompt_id", "context", "group")},
        }
        return {name: values for name, values in columns.items() if self.takes_all or name in self.parameters}


def load_reward_function(name: str) -> RewardFunction:
    """The function MODULE:NAME; of a class an instance, made without arguments.

    The module is looked up as Python does: in the folder of the command and among the installed packages (on a cluster
    on every node). Raises UserError for a module that cannot be imported, and for what is no such function.
    """
    module_name, _, attribute = name.partition(":")
    if (here := os.getcwd()) not in sys.path:  # as `python -m` has it; the installed command has not
        sys.path.insert(0, here)
    try:
        module = importlib.import_module(module_name)
    except Exception as error:
        raise UserError(
            f"{KEY} {name}: cannot import {module_name}: {type(error).__name__}: {error}; expected a module in the "
            "folder that the command is started in, or an installed one"
        ) from error
    function = getattr(module, attribute, None)
    if not callable(function):
        raise UserError(f"{KEY} {name}: expected a function or a class {attribute!r} in {module_name}, found none")
    try:
        callable_: Any = function() if inspect.isclass(function) else function
        parameters = inspect.signature(callable_).parameters.values()
    except Exception as error:
        raise UserError(f"{KEY} {name}: cannot be used: {type(error).__name__}: {error}") from error
    by_name = [one for one in parameters if one.kind in (one.POSITIONAL_OR_KEYWORD, one.KEYWORD_ONLY)]
    needed = [one.name for one in by_name if one.default is one.empty]
    takes_all = any(one.kind is one.VAR_KEYWORD for one in parameters)
    if not takes_all and not {"completions", "completion_ids"} & {one.name for one in by_name}:
        raise UserError(
            f"{KEY} {name}: expected a function of completions, as in def {attribute}(prompts, completions, **kwargs); "
            f"found the parameters: {', '.join(one.name for one in by_name) or 'none'}"
        )
    return RewardFunction(
        name=name,
        source=_source_hash(module),
        function=callable_,
        parameters=tuple(one.name for one in by_name),
        takes_all=takes_all,
        columns=tuple(one for one in needed if one not in ALWAYS),
    )


def _numbers(returned: Any, expected: int, where: str) -> Rewards:
    """What a function returned, as numbers or None; raises UserError for anything that is not one for each response."""
    try:
        values = list(returned)
    except TypeError:
        raise UserError(f"{where}: expected a list of numbers, found {brief(returned)}") from None
    if len(values) != expected:
        raise UserError(f"{where}: expected {expected} numbers, one for each response, found {len(values)}")
    numbers: Rewards = []
    for value in values:
        value = value.item() if hasattr(value, "item") else value  # of numpy or torch
        if value is not None and not isinstance(value, Real):
            raise UserError(f"{where}: expected numbers or None, found {brief(value)}")
        numbers.append(None if value is None or not math.isfinite(value) else float(value))
    return numbers


def _source_hash(module: Any) -> str:
    """12 hex digits of a module's text; "unknown" for one that has none."""
    try:
        return hashlib.sha256(inspect.getsource(module).encode()).hexdigest()[:12]
    except (OSError, TypeError):
        return "unknown"
