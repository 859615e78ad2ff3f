"""From a row of preference data that exists to a pair of texts: the columns of each tool, as it documents them.

The other direction is `formats`. Everywhere a prompt is a text, which is what the user says, or chat messages; a
response is a text or the assistant's message, and a row has one chosen response and one or more rejected ones. Pure;
nothing here imports ray, torch or vllm.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from pydantic import ValidationError

from mipo_ray.config.pairs import PairFormat
from mipo_ray.config.prompts import TrainingPromptsConfig
from mipo_ray.errors import UserError, brief, cut
from mipo_ray.prompts.reading import SourceRow
from mipo_ray.prompts.rows import Message, chat_messages, encodable


@dataclass(frozen=True)
class GivenPair:
    """The texts of a pair: chat messages that end with the user's, the response that is better, and those that are not.

    template_arguments: what the row itself gives the chat template, over `prompts.template_arguments`.
    """

    messages: list[Message]
    chosen: str
    rejected: tuple[str, ...]
    template_arguments: dict[str, Any]


@dataclass(frozen=True)
class Columns:
    """Where a tool's rows have what; of several names the first that a row has.

    prompt: "" where the conversations of chosen and rejected may hold it. chosen: "" where it may be the last message
    of the prompt's column. more: a second part of the prompt's text. arguments: variables of the chat template.
    """

    prompt: tuple[str, ...]
    chosen: tuple[str, ...]
    rejected: tuple[str, ...]
    more: str = ""
    system: str = ""
    history: str = ""
    arguments: str = ""


# Of which tools the documentation is, `formats.FORMATS` says.
COLUMNS: dict[PairFormat, Columns] = {
    "trl": Columns(("prompt", ""), ("chosen",), ("rejected",), arguments="chat_template_kwargs"),
    "openrlhf": Columns(("prompt", ""), ("chosen",), ("rejected",)),
    "axolotl": Columns(
        ("messages", "prompt", "question", "instruction", "input", ""),
        ("chosen", "chosen_response"),
        ("rejected", "rejected_response"),
        system="system",
    ),
    "llama-factory": Columns(
        ("conversations", "messages", "instruction"),
        ("chosen",),
        ("rejected",),
        more="input",
        system="system",
        history="history",
    ),
    "ms-swift": Columns(
        ("messages", "query", "instruction"),
        ("response", "output", ""),
        ("rejected_response", "rejected_messages"),
        more="input",
        system="system",
        history="history",
    ),
}
# What training here has no place for; an empty one is none.
_UNREAD = ("tools", "images", "image", "videos", "audios")
_SHAREGPT = {"human": "user", "gpt": "assistant", "system": "system"}


def format_of(row: SourceRow) -> PairFormat:
    """Whose columns a row has. Raises UserError for a row that has no tool's."""
    found = {name for name, value in row.values.items() if value is not None}
    if found & {"rejected_response", "rejected_messages"}:
        return "axolotl" if "chosen_response" in found else "ms-swift"
    if not {"chosen", "rejected"} <= found:
        raise UserError(
            f"{row.where}: expected the columns of preference pairs (prompt, chosen and rejected, or as the tools that "
            f"pairs.format names document them), found {cut(', '.join(row.values)) or 'none'}"
        )
    if "prompt" in found:  # TRL has no column for a system message, and would leave it out
        return "axolotl" if "system" in row.values else "trl"
    if found & {"conversations", "instruction"}:
        return "llama-factory"
    return "axolotl" if found & {"messages", "question", "input"} else "trl"


def read_pair(row: SourceRow, format: PairFormat) -> GivenPair:
    """The pair of a row.

    Raises UserError naming file, row and field, what was expected and what was found.
    """
    columns = COLUMNS[format]
    for name in _UNREAD:
        if row.values.get(name) not in (None, "", "[]", [], {}):
            raise UserError(f"{row.where}, field {name!r}: expected text alone, found {_show(row.values[name])}")
    prompt_column = _first(row, columns.prompt, format)
    chosen_column = _first(row, columns.chosen, format) or prompt_column
    rejected_column = _first(row, columns.rejected, format)
    rejected = _responses(row, rejected_column)
    chosen, *others = _responses(row, chosen_column)
    if others:
        raise UserError(f"{row.where}, field {chosen_column!r}: expected one response, found {1 + len(others)}")
    if any(turns.prompt != chosen.prompt for turns in rejected if turns.prompt or chosen_column != prompt_column):
        raise UserError(
            f"{row.where}, field {rejected_column!r}: expected the conversation of field {chosen_column!r} but for its "
            "last message, found another one"
        )
    if chosen.prompt and chosen_column != prompt_column and isinstance(row.values.get(prompt_column), list):
        raise UserError(
            f"{row.where}, field {chosen_column!r}: expected one message of the assistant, since those before it are "
            f"in field {prompt_column!r}; found {1 + len(chosen.prompt)} messages"
        )
    if chosen.prompt:
        column, messages = chosen_column, chosen.prompt
    elif prompt_column:
        column, messages = prompt_column, _prompt(row, prompt_column, columns)
    else:
        raise UserError(
            f"{row.where}, field {chosen_column!r}: expected a conversation of a prompt and its response, or the "
            f"prompt in a column of its own ({', '.join(filter(None, columns.prompt))}); found "
            f"{_show(row.values[chosen_column])}; the row has the columns: {cut(', '.join(row.values))}"
        )
    return GivenPair(
        chat_messages(row, column, _with_system(row, columns, messages)),
        chosen.response,
        tuple(turns.response for turns in rejected),
        _template_arguments(row, columns.arguments),
    )


class _Turns(NamedTuple):
    """A response, and the messages before it where they stand in the same column."""

    prompt: list[Any]
    response: str


def _first(row: SourceRow, names: Sequence[str], format: PairFormat) -> str:
    """The first of these columns in which the row has a value; "" where it is one of them, and the row has no other."""
    for name in names:
        if name == "" or row.values.get(name) is not None:
            return name
    expected = " or ".join(name for name in names if name)
    raise UserError(
        f"{row.where}: expected a value in column {expected}, as rows of {format} have it, found none; the row has the "
        f"columns: {cut(', '.join(row.values)) or 'none'}; pairs.format says whose they are"
    )


def _prompt(row: SourceRow, column: str, columns: Columns) -> list[Any]:
    """The messages of a prompt that stands in a column of its own, as they are."""
    value = row.values[column]
    if isinstance(value, list):
        return _messages(row, column)
    if not isinstance(value, str):
        raise UserError(
            f"{row.where}, field {column!r}: expected a text or a list of {{role, content}} messages, found "
            f"{_show(value)}"
        )
    more = row.values.get(columns.more) if columns.more and columns.more != column else None
    if more is not None and not isinstance(more, str):
        raise UserError(f"{row.where}, field {columns.more!r}: expected a text, found {_show(more)}")
    return [*_history(row, columns.history), _user(f"{value}\n{more}" if more else value)]


def _history(row: SourceRow, column: str) -> list[Any]:
    """Earlier turns: [question, answer] each."""
    turns = (row.values.get(column) if column else None) or []
    if not isinstance(turns, list) or not all(
        isinstance(turn, list) and len(turn) == 2 and all(isinstance(text, str) for text in turn) for turn in turns
    ):
        raise UserError(
            f"{row.where}, field {column!r}: expected a list of [question, answer], each a text; found {_show(turns)}"
        )
    return [message for question, answer in turns for message in (_user(question), _assistant(answer))]


def _with_system(row: SourceRow, columns: Columns, messages: list[Any]) -> list[Any]:
    text = row.values.get(columns.system) if columns.system else None
    if not text:
        return messages
    if not isinstance(text, str):
        raise UserError(f"{row.where}, field {columns.system!r}: expected a text, found {_show(text)}")
    if messages and isinstance(messages[0], dict) and messages[0].get("role") == "system":
        raise UserError(
            f"{row.where}, field {columns.system!r}: expected one system message, found another one in the messages"
        )
    return [{"role": "system", "content": text}, *messages]


def _responses(row: SourceRow, column: str) -> list[_Turns]:
    """The responses of a column, each with the conversation before it where the column holds that."""
    value = row.values[column]
    where = f"{row.where}, field {column!r}"
    # One response: a text, a message, or messages of which it is the last. Several: a list of these.
    several = value if isinstance(value, list) and value and not isinstance(value[0], dict) else [value]
    found = []
    for number, one in enumerate(several):
        place = where if len(several) == 1 else f"{where}, response {number}"
        if isinstance(one, str):
            found.append(_Turns([], encodable(place, one)))
            continue
        messages = _as_messages([one] if isinstance(one, dict) else one, place)
        if not messages or not all(isinstance(message, dict) for message in messages):
            raise UserError(
                f"{place}: expected a response: a text, the assistant's message {{role, content}}, or messages that "
                f"end with it (several responses: a list of these); found {_show(one)}"
            )
        last = messages[-1]
        if last.get("role") != "assistant" or not isinstance(last.get("content"), str):
            raise UserError(
                f"{place}: expected the last message to be the assistant's, with a text as content; found {_show(last)}"
            )
        if len(messages) > 1 and messages[-2].get("role") == "assistant":
            raise UserError(
                f"{place}: expected one message of the assistant behind the prompt, found several; several responses "
                "are a list of texts, or a list of lists of messages"
            )
        found.append(_Turns(messages[:-1], encodable(place, last["content"])))
    return found


def _messages(row: SourceRow, column: str) -> list[Any]:
    value, where = row.values[column], f"{row.where}, field {column!r}"
    messages = _as_messages(value, where)
    if not messages:
        raise UserError(f"{where}: expected a list of {{role, content}} messages, found {_show(value)}")
    return messages


def _as_messages(value: Any, where: str) -> list[Any]:
    """The messages of a list, {from, value} as {role, content}; [] for what is no list."""
    if not isinstance(value, list):
        return []
    return [_as_message(message, f"{where}, message {number}") for number, message in enumerate(value)]


def _as_message(message: Any, where: str) -> Any:
    if not isinstance(message, dict):
        return message
    message = {name: value for name, value in message.items() if value is not None}
    if "from" not in message or "role" in message:
        return message
    said = message.pop("from")
    if said not in _SHAREGPT:
        raise UserError(f"{where}: expected one from {', '.join(_SHAREGPT)}; found {_show(said)}")
    return {"role": _SHAREGPT[said], "content": message.pop("value", None), **message}


def _template_arguments(row: SourceRow, column: str) -> dict[str, Any]:
    value = row.values.get(column) if column else None
    if value is None:
        return {}
    if isinstance(value, str):  # as CSV has it
        try:
            value = json.loads(value)
        except ValueError:
            value = str(value)
    if not isinstance(value, dict):
        raise UserError(f"{row.where}, field {column!r}: expected a mapping of variables, found {_show(value)}")
    value = {name: one for name, one in value.items() if one is not None}
    try:
        TrainingPromptsConfig(template_arguments=value)
    except ValidationError as error:
        reason = error.errors()[0]["msg"].removeprefix("Value error, ")
        raise UserError(f"{row.where}, field {column!r}: {reason}") from None
    return value


def _user(text: str) -> Message:
    return {"role": "user", "content": text}


def _assistant(text: str) -> Message:
    return {"role": "assistant", "content": text}


def _show(value: Any) -> str:
    return "null" if value is None else f"{type(value).__name__} {brief(value, 60)}"
