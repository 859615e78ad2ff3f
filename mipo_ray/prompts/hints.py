"""What a prompt file that cannot be read as its name says probably is, for the end of an error message."""

from __future__ import annotations

import json
from typing import Any

from mipo_ray.errors import brief, cut

# How files begin that are not what they are called.
_BEGINNINGS = (
    (b"\x1f\x8b", "a gzip archive; call it .gz"),
    (b"(\xb5/\xfd", "a zstd archive; call it .zst"),
    (b"BZh", "a bzip2 archive; call it .bz2"),
    (b"\xfd7zXZ", "an xz archive; call it .xz"),
    (b"PAR1", "a Parquet file; call it .parquet"),
    (b"PK\x03\x04", "a zip archive or a workbook of Excel; export it as CSV"),
    (b"\xff\xfe", "UTF-16 text; write it as UTF-8"),
    (b"\xfe\xff", "UTF-16 text; write it as UTF-8"),
    (b"version https://git-lfs", "a pointer of Git LFS; fetch the file itself with git lfs pull"),
    (b"<", "a page of HTML or XML, perhaps that of an error or a login"),
)
_SEPARATORS = {";": "semicolons", "\t": "tabs", "|": "bars"}
_MESSAGE = {"role", "content"}


def looks_like(beginning: bytes, cut_short: str = "") -> str:
    """A hint to append to a message, `; the file looks like X`, by the first bytes of a file; "" for any other.

    `cut_short`: what it is called; one that begins as such files do can only be damaged.
    """
    beginning = beginning.removeprefix(b"\xef\xbb\xbf").lstrip()
    what = next((what for start, what in _BEGINNINGS if beginning.startswith(start)), "")
    if cut_short and what.startswith(cut_short):
        what = f"{cut_short} that was cut short"
    return what and f"; the file looks like {what}"


def line_hint(line: bytes, is_first: bool) -> str:
    """A hint for a line that is no JSON object; `is_first`: it is the first of the file with text."""
    if is_first and (hint := looks_like(line)):
        return hint
    text = line.decode("utf-8", errors="replace").strip()
    if is_first and text.startswith("["):
        return "; the file looks like a JSON array: call it .json"
    if text.startswith("{") and not text.endswith("}"):
        return "; a row must stand whole on one line"
    return ""


def separator_of(header: list[str]) -> str | None:
    """What stands between the names of a CSV header instead of commas, in words; None where commas do."""
    if len(header) != 1:
        return None
    for mark, words in _SEPARATORS.items():
        if len([name for name in header[0].split(mark) if name.strip()]) > 1:
            return words
    return None


def boxed_rows(content: dict[str, Any]) -> str | None:
    """What is wrong with a JSON file that holds this one object and should hold rows; None for an object that is a row.

    Rows under a key, and tables written column by column, are told from a row by what they hold: a row's own lists are
    texts or chat messages.
    """
    for key, value in content.items():
        rows = value if isinstance(value, list) and all(isinstance(row, dict) for row in value) else []
        if any(not row.keys() <= _MESSAGE for row in rows):
            return f"one object whose key {brief(key)} holds {len(rows)} rows: write that list alone (jq '.{cut(key)}')"
    columns = list(content.values())
    if _are_equally_long(columns, dict) and all(str(index).isdigit() for index in columns[0]):
        return "one object of columns, as pandas writes it: write rows (to_json with orient='records')"
    if len(columns) > 1 and _are_equally_long(columns, list):
        return "one object with a list for each column: write a list of rows"
    return None


def _are_equally_long(columns: list[Any], kind: type) -> bool:
    """Whether there are columns, all of one kind and of one length above 1."""
    lengths = {len(column) if isinstance(column, list | dict) and type(column) is kind else 0 for column in columns}
    return len(lengths) == 1 and min(lengths) > 1


def whole_object(content: bytes) -> dict[str, Any] | None:
    """The object that a file consists of; None where it holds anything else, or several."""
    try:
        value = json.loads(content.decode("utf-8-sig"))
    except (ValueError, RecursionError):
        return None
    return value if isinstance(value, dict) else None
