"""From a row of a prompt file to the prompt row that the rest of the project reads: one pure function.

Nothing here imports ray, torch or vllm.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, NamedTuple, TypedDict

import pyarrow as pa

from mipo_ray.config.prompts import PromptsConfig
from mipo_ray.errors import UserError
from mipo_ray.prompts.files import PromptFile
from mipo_ray.prompts.reading import SourceRow, missing_column
from mipo_ray.prompts.templates import check_question_columns, render_context, render_question

ROLES = ("system", "user", "assistant")
MESSAGES = pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())]))

# The columns of `PromptRow` but for the reference, whatever the file looked like.
PROMPT_SCHEMA = pa.schema(
    [
        ("prompt_id", pa.string()),
        ("messages", MESSAGES),
        ("question_messages", MESSAGES),
        ("context", pa.string()),
        ("group", pa.string()),
        ("text", pa.string()),
        ("extra", pa.string()),
    ]
)

ROWS_PER_TABLE = 256

Message = dict[str, str]


class PromptRow(TypedDict):
    """One prompt.

    prompt_id: unique; made of file name and row number where the file has none.
    messages: chat messages ending with user; the context in the last one or in the system message, as
        `prompts.context_role` says; exemplars after the system message.
    question_messages: the same without the context; equal to `messages` where there is none.
    context, group: "" where the row has none.
    text: what decides whether two prompts are the same: `messages` with runs of white space made one space.
    reference: a good answer, "" where the row has none. Judges alone read it: it does not travel with a round's rows.
    extra: the file's other columns, as one JSON object.
    """

    prompt_id: str
    messages: list[Message]
    question_messages: list[Message]
    context: str
    group: str
    text: str
    reference: str
    extra: str


class ContentHash:
    """What the rows of one file say, as one short hash: equal before and after unless an edit changed what is read.

    It is made of rows and not of the file's bytes, for three reasons: with `prompts.limit` the rest of a file is never
    read, Parquet is not read from front to end, and copies of a file on several nodes may differ in time, or in how
    they are compressed. What a loader adds to a row (PRISM's profiles) counts too.
    """

    def __init__(self) -> None:
        self._hash = hashlib.blake2b(digest_size=8)

    def add(self, row: Mapping[str, Any]) -> None:
        # All of the row but `text`, which follows from `messages`.
        values = [value for name, value in row.items() if name != "text"]
        self._hash.update(json.dumps(values).encode() + b"\n")

    def __str__(self) -> str:
        return self._hash.hexdigest()


class CheckedFile(NamedTuple):
    """What the check found in one file: how many rows the run uses, and their `ContentHash`."""

    source: PromptFile
    rows: int
    content_hash: str


def checked_rows(file: CheckedFile, sources: Iterable[SourceRow], prompts: PromptsConfig) -> Iterator[PromptRow]:
    """The prompt rows of a checked file, of which `sources` are read anew, in order.

    Raises UserError behind the last one, naming the file, where they are not what was checked: another number of rows,
    or other rows.
    """
    # One row more than expected, where no limit cut the file, shows that it grew.
    most = file.rows + (prompts.limit is None)
    found, content = 0, ContentHash()
    for source in islice(sources, most):
        row = normalize_row(source, prompts)
        content.add(row)
        found += 1
        yield row
    path = file.source.path
    if found != file.rows:
        raise UserError(f"{path}: had {file.rows} rows when it was checked, found {found} now")
    if str(content) != file.content_hash:
        profiles = f" (or its profiles, {prompts.profiles_path})" if prompts.profiles_path else ""
        raise UserError(
            f"{path}: the {found} rows had content hash {file.content_hash} when they were checked, found {content} "
            f"now: the file{profiles} was edited while the run was under way; start the run again"
        )


def prompt_tables(file: CheckedFile, sources: Iterable[SourceRow], prompts: PromptsConfig) -> Iterator[pa.Table]:
    """The rows of `checked_rows` with PROMPT_SCHEMA, ROWS_PER_TABLE at a time."""
    rows = checked_rows(file, sources, prompts)
    while batch := list(islice(rows, ROWS_PER_TABLE)):
        yield pa.Table.from_pylist(batch, schema=PROMPT_SCHEMA)


def normalize_row(row: SourceRow, prompts: PromptsConfig) -> PromptRow:
    """Checks one row of a prompt file and brings it into the form of `PromptRow`.

    Raises UserError naming file, row and field, what was expected and what was found.
    """
    question_messages = _question(row, prompts)
    context = _optional_string(row, prompts.context_column)
    context = context if context.strip() else ""
    try:
        messages = with_context(question_messages, context, prompts) if context else question_messages
    except UserError as error:
        raise UserError(f"{row.where}: {error}") from None
    used = {prompts.context_column, prompts.group_column, prompts.id_column}
    if prompts.question_template is None:
        used.add(prompts.column)
    # Public sets publish whole conversations beside each prompt; nothing reads them here.
    columns = row.values if prompts.loader == "rows" else {}
    extra = {name: value for name, value in columns.items() if name not in used and value is not None}
    return PromptRow(
        prompt_id=_prompt_id(row, prompts.id_column),
        messages=messages,
        question_messages=question_messages,
        context=context,
        group=_optional_string(row, prompts.group_column, integers=True),
        text=json.dumps([[message["role"], " ".join(message["content"].split())] for message in messages]),
        reference=_reference(row, prompts.reference_column),
        extra=json.dumps(extra, default=str),
    )


def with_context(question_messages: list[Message], context: str, prompts: PromptsConfig) -> list[Message]:
    """The messages with `context` put in as `prompts.context_role` and `prompts.context_template` say.

    user: joined into the last message. system: after the system message that is there, whose text many users share
    (shared text first, so that the engine's prefix cache can hit), or as a system message of its own. Raises UserError
    when the template fails or gives an empty text.
    """
    first, last = question_messages[0], question_messages[-1]
    rendered = render_context(prompts, context, last["content"])
    if prompts.context_role == "user":
        return [*question_messages[:-1], {"role": "user", "content": rendered}]
    if first["role"] == "system":
        return [{"role": "system", "content": f"{first['content']}\n\n{rendered}"}, *question_messages[1:]]
    return [{"role": "system", "content": rendered}, *question_messages]


def _question(row: SourceRow, prompts: PromptsConfig) -> list[Message]:
    messages = _own_messages(row, prompts)
    system = [{"role": "system", "content": prompts.system}] if prompts.system else []
    if messages[0]["role"] == "system":
        system, messages = messages[:1], messages[1:]
    exemplars = [
        {"role": role, "content": content}
        for exemplar in prompts.exemplars
        for role, content in (("user", exemplar.question), ("assistant", exemplar.answer))
    ]
    return [*system, *exemplars, *messages]


def _own_messages(row: SourceRow, prompts: PromptsConfig) -> list[Message]:
    """What the row itself brings: a system message, if it has one, and turns that end with the user's."""
    if prompts.question_template is not None:
        return [{"role": "user", "content": _templated(row, prompts, prompts.question_template)}]
    column = prompts.column
    if column not in row.values:
        raise missing_column(row, column)
    value = row.values[column]
    if isinstance(value, str):
        return [{"role": "user", "content": _filled(row, column, value)}]
    if isinstance(value, list):
        return chat_messages(row, column, value)
    expected = "a string or a list of {role, content} messages"
    raise UserError(f"{row.where}, field {column!r}: expected {expected}, found {_show(value)}")


def _templated(row: SourceRow, prompts: PromptsConfig, template: str) -> str:
    try:
        text = render_question(template, row.values)
    except UserError as error:
        check_question_columns(prompts, row)  # a missing column is the likeliest cause, and the clearest message
        raise UserError(f"{row.where}: {error}") from None
    return encodable(f"{row.where}, question_template", text)


def chat_messages(row: SourceRow, column: str, values: list[Any]) -> list[Message]:
    """The messages of a prompt, which end with the user's, as `column` holds them.

    Raises UserError naming file, row, field and message, what was expected and what was found.
    """
    where = f"{row.where}, field {column!r}"
    if not values:
        raise UserError(f"{where}: expected at least one chat message, found an empty list")
    messages = []
    for index, value in enumerate(values):
        if not isinstance(value, dict):
            raise UserError(f"{where}, message {index}: expected {{role, content}}, found {_show(value)}")
        # Tables give every message every key; a null is a key that the message does not have.
        unknown = sorted(key for key in value if key not in ("role", "content") and value[key] is not None)
        if unknown:
            raise UserError(f"{where}, message {index}: expected only role and content, found {', '.join(unknown)}")
        role, content = value.get("role"), value.get("content")
        if role not in ROLES:
            raise UserError(f"{where}, message {index}: expected a role of {', '.join(ROLES)}; found {_show(role)}")
        if not isinstance(content, str):
            raise UserError(f"{where}, message {index}: expected a string as content, found {_show(content)}")
        messages.append({"role": role, "content": encodable(where, content)})
    if messages[-1]["role"] != "user":
        raise UserError(f"{where}: expected the last message to be the user's, found role {messages[-1]['role']!r}")
    _filled(row, column, messages[-1]["content"])
    return messages


def _prompt_id(row: SourceRow, column: str) -> str:
    if row.values.get(column) is None:
        return row.numbered_id
    prompt_id = _optional_string(row, column, integers=True)
    if not prompt_id:
        raise UserError(f"{row.where}, field {column!r}: expected a unique id, found an empty string")
    return prompt_id


def _optional_string(row: SourceRow, column: str, integers: bool = False) -> str:
    value = row.values.get(column)
    if value is None:
        return ""
    if integers and isinstance(value, int) and not isinstance(value, bool):
        return str(value)
    if not isinstance(value, str):
        expected = "a string or an integer" if integers else "a string"
        raise UserError(f"{row.where}, field {column!r}: expected {expected}, found {_show(value)}")
    return encodable(f"{row.where}, field {column!r}", value)


def _reference(row: SourceRow, column: str) -> str:
    """The text in an optional column that most runs do not read: what is no text or number there is no reference."""
    value = row.values.get(column)
    if isinstance(value, bool) or not isinstance(value, str | int | float):
        return ""
    return encodable(f"{row.where}, field {column!r}", str(value)) if str(value).strip() else ""


def _filled(row: SourceRow, column: str, text: str) -> str:
    if not text.strip():
        raise UserError(f"{row.where}, field {column!r}: expected a prompt, found an empty string")
    return encodable(f"{row.where}, field {column!r}", text)


def encodable(where: str, text: str) -> str:
    """The text; raises UserError for half of a surrogate pair, which JSON can spell and no UTF-8 table can hold."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"{where}: expected Unicode text, found a lone surrogate at character {error.start}") from None
    return text


def _show(value: Any) -> str:
    if value is None:
        return "null"
    text = repr(value)
    return f"{type(value).__name__} {text if len(text) <= 60 else text[:57] + '...'}"
