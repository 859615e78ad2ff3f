"""A prompt file -> a stream of rows, each of which knows where it stands.

One reader serves the check before the run (`check`) and the read tasks on the cluster (`dataset`), so that what
was checked is what is read. Files are streamed: memory does not grow with their size, nor with what a packed one says
that it holds. A file's format yields its rows, each with its number and its values. Nothing here imports ray.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import IO, Any, NamedTuple

from mipo_ray.errors import UserError, cut
from mipo_ray.examples import bundled_path
from mipo_ray.paths import open_path
from mipo_ray.prompts.bounded import Again, CsvLines, elements_of, has_too_many, lines_of
from mipo_ray.prompts.files import BUNDLED, PromptFile
from mipo_ray.prompts.hints import boxed_rows, line_hint, looks_like, separator_of, whole_object
from mipo_ray.prompts.packed import UNREADABLE, open_unpacked
from mipo_ray.tables.row_limit import LONGEST_ROW, too_many

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in the file: where ("FILE, line 3"), an id made of that, and column name -> value."""

    where: str
    numbered_id: str
    values: dict[str, Any]


class _FoundRow(NamedTuple):
    """A row of a file: "line" or "row", which of them, and column name -> value."""

    unit: str
    number: int
    values: dict[str, Any]


def read_rows(file: PromptFile) -> Iterator[SourceRow]:
    """Yields the rows of one file in order; blank lines are no rows.

    A .json file holds one array of objects, or lines as JSONL does. A value that is missing (null, NaN, a time that is
    none) is None, at any depth, in every format. Raises UserError naming file and line (JSONL) or row (counted from 1,
    without the header) for content that cannot be decoded, and for a row that is too long.
    """
    readers = {"JSONL": _read_jsonl, "JSON": _read_json, "Parquet": _read_parquet, "CSV": _read_csv}
    path = str(bundled_path(file.path.removeprefix(BUNDLED))) if file.path.startswith(BUNDLED) else file.path
    try:
        filesystem, name = open_path(path)
        with open_unpacked(filesystem, name) as stream:
            for unit, number, values in readers[file.format](stream, file.path):
                where = f"{file.path}, {unit} {number}"
                try:
                    values = _with_nulls(values)
                except RecursionError:
                    raise UserError(f"{where}: the values are nested too deep") from None
                yield SourceRow(where, f"{file.label}:{number}", values)
    except FileNotFoundError:
        raise UserError(
            f"{file.path}: no such file on this machine; a cluster needs its prompts on storage that every node reads"
        ) from None
    except UNREADABLE as error:
        raise UserError(f"{file.path}: cannot be read: {type(error).__name__}: {error}") from None


def missing_column(row: SourceRow, column: str, needed_by: str = "") -> UserError:
    """The error for a row without `column`: where it stands, the columns that it has, and the nearest of them.

    needed_by: a clause that says who needs the column, for example ", which loader prism reads".
    """
    columns = ", ".join(row.values) or "none"
    hint = nearest(column, row.values)
    return UserError(f"{row.where}: no column {column!r}{needed_by}; the row has the columns: {columns}{hint}")


def nearest(name: str, valid: Iterable[str]) -> str:
    """A hint to append to a message, `; did you mean 'X'?`, for the closest valid name; "" when none is close."""
    matches = difflib.get_close_matches(name, list(valid), n=1, cutoff=0.5)
    return f"; did you mean {matches[0]!r}?" if matches else ""


def _read_jsonl(stream: IO[bytes], shown: str) -> Iterator[_FoundRow]:
    """One object a line; blank lines are no rows, and are counted."""
    is_first = True
    for number, line in enumerate(lines_of(stream, shown, LONGEST_ROW), start=1):
        where = f"{shown}, line {number}"
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        values = _parsed_json(where, line, functools.partial(line_hint, is_first=is_first))
        if not isinstance(values, dict):
            hint = line_hint(line, is_first)
            raise UserError(f"{where}: expected one JSON object per line, found {type(values).__name__}{hint}")
        is_first = False
        yield _FoundRow("line", number, values)


def _read_json(stream: IO[bytes], shown: str) -> Iterator[_FoundRow]:
    """An array of objects, one object, or lines as JSONL has them. A file no larger than a row may be is read whole."""
    content = stream.read(LONGEST_ROW + 1)
    is_whole = len(content) <= LONGEST_ROW and not has_too_many(content)
    content = content.removeprefix(_BYTE_ORDER_MARK)
    if not content.lstrip().startswith(b"["):
        if is_whole and (only := whole_object(content)) is not None:
            if (found := boxed_rows(only)) is not None:
                raise UserError(f"{shown}: expected an array of objects, or one object per line; found {found}")
            yield _FoundRow("row", 1, only)
            return
        yield from _read_jsonl(io.BufferedReader(Again(content, stream)), shown)
        return
    if is_whole:
        rows = iter(_parsed_json(shown, content))
    else:
        elements = enumerate(elements_of(content, stream, shown, LONGEST_ROW), start=1)
        rows = (_parsed_json(f"{shown}, row {number}", element) for number, element in elements)
    for number, values in enumerate(rows, start=1):
        if not isinstance(values, dict):
            raise UserError(f"{shown}, row {number}: expected a JSON object, found {type(values).__name__}")
        yield _FoundRow("row", number, values)


def _read_parquet(stream: IO[bytes], shown: str) -> Iterator[_FoundRow]:
    """The rows of a Parquet file; one that holds a column of an extension type is refused before it is read."""
    import pyarrow

    from mipo_ray.tables.parquet import read_batches

    number = 0
    try:
        for batch in read_batches(stream, shown, LONGEST_ROW):
            for values in batch.to_pylist():
                number += 1
                yield _FoundRow("row", number, values)
    except UserError:
        raise
    except (pyarrow.ArrowException, ValueError) as error:  # ValueError, too, for names that are no text
        stream.seek(0)
        hint = "" if number else looks_like(stream.read(64), cut_short="a Parquet file")
        raise UserError(f"{shown}: not a readable Parquet file after row {number}: {error}{hint}") from None


def _read_csv(stream: IO[bytes], shown: str) -> Iterator[_FoundRow]:
    """Rows of text under a header, with commas; fields may hold line breaks."""
    csv.field_size_limit(LONGEST_ROW)  # the csv module's own limit of 128 KiB is shorter than a long prompt
    number = 0
    lines = CsvLines(io.TextIOWrapper(stream, encoding="utf-8-sig", newline=""), LONGEST_ROW)
    lines.begin(f"{shown}, header")
    try:
        records = csv.reader(lines, strict=True)
        header = next(records, [])
        if (separator := separator_of(header)) is not None:
            raise UserError(
                f"{shown}, header: expected commas between the columns, found {separator}: {cut(header[0])}; "
                "write the file with commas, and quotes around what holds one"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{shown}, header: expected every column name once, found {cut(', '.join(header))}")
        lines.begin(f"{shown}, row 1")
        for record in records:
            if record:
                number += 1
                if len(record) != len(header):
                    expected = f"expected {len(header)} fields as in the header, found {len(record)}"
                    raise UserError(f"{shown}, row {number}: {expected}")
                yield _FoundRow("row", number, dict(zip(header, record, strict=True)))
            lines.begin(f"{shown}, row {number + 1}")
    except csv.Error as error:
        raise UserError(f"{shown}, row {number + 1}: broken CSV: {error}") from None
    except UnicodeDecodeError as error:
        hint = "" if number else looks_like(error.object[:64])
        raise UserError(f"{shown}, near row {number + 1}: expected UTF-8 text: {error.reason}{hint}") from None


def _parsed_json(where: str, content: bytes, hint: Callable[[bytes], str] = looks_like) -> Any:
    """The value in the text of a file, or of one of its lines, which `where` names; raises UserError, with what `hint`
    says of the text at its end, for none."""
    if has_too_many(content):
        raise too_many(where)
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8 text, found byte {content[error.start]:#04x}{hint(content)}"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError, too, for a number of more than 4,300 digits
        raise UserError(f"{where}: broken JSON: {error}{hint(content)}") from None


def _with_nulls(value: Any) -> Any:
    """The value with None wherever it holds what is not equal to itself: NaN, NaT, which would print as words."""
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if value != value else value
