"""Records: frozen dataclasses that stand for the JSON of a run directory's files, read and written in one place.

A record's fields are the keys of its JSON object, in order. A field with a default may be missing in a file, as earlier
versions wrote it; keys that a record does not know are ignored. What a file holds is checked strictly: true is no
number, and 1 is no text.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, cast

from pydantic import TypeAdapter, ValidationError

from mipo_ray.errors import UserError, brief

Record = TypeVar("Record")

MOST_CHARACTERS = 80  # of what was found, in a message


class RecordError(UserError):
    """A file does not hold the record that is expected there."""


def optional(beside: str = "") -> Any:
    """A field that is None where a file does not have it, and is left out of the file where it is None.

    beside: the field beside which it always stands, as null where it is None.
    """
    return field(default=None, metadata={"optional": True, "beside": beside})


def read_record(kind: type[Record], text: str, file: str) -> Record:
    """The record of a file's text. Raises RecordError, naming the file and the first wrong field, for anything else.

    `kind` may also be a dict of records, of text, of numbers and so on.
    """
    try:
        record: Record = _adapter(cast(Any, kind)).validate_json(text, strict=True)
    except ValidationError as error:
        raise RecordError(f"{file}: {_explained(error)}") from None
    return record


def to_json(value: Any) -> Any:
    """A record, or what holds records, as dicts, lists, text and numbers, in the order of the fields."""
    if is_dataclass(value) and not isinstance(value, type):
        return {one.name: to_json(getattr(value, one.name)) for one in fields(value) if _is_written(value, one)}
    if isinstance(value, Mapping):
        return {name: to_json(each) for name, each in value.items()}
    return [to_json(each) for each in value] if isinstance(value, list | tuple) else value


def to_text(value: Any) -> str:
    """The text of the file that holds a record."""
    return json.dumps(to_json(value), indent=2)


@cache
def _adapter(kind: Any) -> TypeAdapter[Any]:
    """Made once for a kind: it costs milliseconds, and a report reads dozens of manifests."""
    return TypeAdapter(kind)


def _is_written(value: Any, one: Any) -> bool:
    if getattr(value, one.name) is not None or not one.metadata.get("optional"):
        return True
    beside = one.metadata["beside"]
    return bool(beside) and getattr(value, beside) is not None


def _explained(error: ValidationError) -> str:
    """One line for the first fault: the field, what was expected, what was found."""
    fault = error.errors(include_url=False)[0]
    if fault["type"] == "json_invalid":
        return f"expected JSON, found: {fault['ctx']['error']}"
    place = ".".join(map(str, fault["loc"]))
    before = f"{place}: " if place else ""
    if fault["type"] == "missing":
        return f"{before}expected a value, found none"
    expected = fault["msg"].removeprefix("Input should be ")
    try:
        found = json.dumps(fault["input"], default=repr, ensure_ascii=False)
    except (ValueError, RecursionError):  # a whole number of thousands of digits; lists in lists in lists
        found = brief(fault["input"])
    found = found if len(found) <= MOST_CHARACTERS else f"{found[: MOST_CHARACTERS - 3]}..."
    return f"{before}expected {expected}, found {found}"
