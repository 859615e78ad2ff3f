"""Prompt files on any filesystem -> a stream of rows, each of which knows where it stands.

One reader serves the check before the run (`check`) and the read tasks on the cluster (`dataset`), so that what
was checked is what is read. Files are streamed: memory does not grow with their size. Nothing here imports ray.
"""

from __future__ import annotations

import csv
import difflib
import functools
import io
import json
import os
import posixpath
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from glob import has_magic
from typing import IO, Any, cast

from mipo_ray.errors import UserError, cut
from mipo_ray.examples import bundled_path
from mipo_ray.paths import local_matches, open_path
from mipo_ray.prompts.hints import boxed_rows, line_hint, looks_like, separator_of, whole_object

BUNDLED = "bundled:"
FORMATS = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".parquet": "Parquet", ".csv": "CSV"}
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
PARQUET_ROWS_PER_BATCH = 256
_BYTE_ORDER_MARK = b"\xef\xbb\xbf"

LONGEST_CSV_FIELD = 2**30  # bytes; the csv module's own limit of 128 KiB is shorter than a long prompt


@dataclass(frozen=True)
class PromptFile:
    """One file: `path` as a worker can open it and as messages show it; `label` names it inside generated ids."""

    path: str
    label: str
    format: str


@dataclass(frozen=True)
class SourceRow:
    """One row as it stands in the file: where ("FILE, line 3"), an id made of that, and column name -> value."""

    where: str
    numbered_id: str
    values: dict[str, Any]


def find_files(path: str, key: str = "prompts.path") -> tuple[PromptFile, ...]:
    """The files that `path` (a file, a glob, or bundled:NAME) stands for, sorted by name.

    `key` is the configuration key that error messages name. Raises UserError when nothing matches, the storage cannot
    be opened, or a suffix is none of FORMATS.
    """
    if path.startswith(BUNDLED):
        # Kept symbolic: the package may lie elsewhere on another machine of the cluster.
        return (PromptFile(path, bundled_path(path.removeprefix(BUNDLED)).name, "JSONL"),)
    try:
        names = _matching_files(path, key)
    except UserError:
        raise
    except Exception as error:  # each storage client raises exceptions of its own
        raise UserError(f"{key}: cannot open {path}: {type(error).__name__}: {error}") from None
    if not names:
        raise UserError(f"{key}: no file matches {path}")
    common = posixpath.dirname(names[0]) if len(names) == 1 else posixpath.commonpath(names)
    return tuple(PromptFile(name, posixpath.relpath(name, common), _format_of(name, key)) for name in names)


def read_rows(file: PromptFile) -> Iterator[SourceRow]:
    """Yields the rows of one file in order; blank lines are no rows.

    A .json file holds one array of objects, which is read whole, or lines as JSONL does. A value that is missing (null,
    NaN, a time that is none) is None, at any depth, in every format. Raises UserError naming file
    and line (JSONL) or row (counted from 1, without the header) for content that cannot be decoded.
    """
    readers = {"JSONL": _read_jsonl, "JSON": _read_json, "Parquet": _read_parquet, "CSV": _read_csv}
    path = str(bundled_path(file.path.removeprefix(BUNDLED))) if file.path.startswith(BUNDLED) else file.path
    try:
        compression = "infer" if file.format != "Parquet" else None
        filesystem, name = open_path(path)
        with filesystem.open(name, "rb", compression=compression) as stream:
            for row in readers[file.format](file, cast(IO[bytes], stream)):
                try:
                    values = _with_nulls(row.values)
                except RecursionError:
                    raise UserError(f"{row.where}: the values are nested too deep") from None
                yield SourceRow(row.where, row.numbered_id, values)
    except FileNotFoundError:
        raise UserError(
            f"{file.path}: no such file on this machine; a cluster needs its prompts on storage that every node reads"
        ) from None
    except (OSError, EOFError, zlib.error) as error:
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


def _matching_files(path: str, key: str) -> list[str]:
    filesystem, root = open_path(path)
    is_local = "file" in _protocols(filesystem)
    if filesystem.isdir(root):
        raise UserError(f"{key}: {path} is a directory; expected a file or a glob such as {path.rstrip('/')}/*.jsonl")
    if filesystem.isfile(root):
        matches = [root]
    elif is_local:
        matches, broken = local_matches(root)
        if not matches and broken:
            raise UserError(f"{key}: no file matches {path}; {broken[0]} is a link to a file that is not there")
    elif has_magic(root):
        found = cast(dict[str, dict[str, Any]], filesystem.glob(root, detail=True))
        matches = [name for name, info in found.items() if info["type"] == "file"]
    else:
        matches = []
    # Names that start with _ or . are markers of the writers (_SUCCESS, .crc), not data.
    matches = [name for name in matches if name == root or name.split("/")[-1][0] not in "_."]
    return sorted(matches) if is_local else sorted(filesystem.unstrip_protocol(name) for name in matches)


def _with_nulls(value: Any) -> Any:
    """The value with None wherever it holds what is not equal to itself: NaN, NaT, which would print as words."""
    if isinstance(value, dict):
        return {key: _with_nulls(part) for key, part in value.items()}
    if isinstance(value, list | tuple):
        return [_with_nulls(part) for part in value]
    return None if value != value else value


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def _format_of(name: str, key: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS and os.path.splitext(stem)[1] != ".parquet":
        suffix = os.path.splitext(stem)[1]
    if suffix not in FORMATS:
        raise UserError(f"{key}: {name}: expected a name that ends in one of {', '.join(FORMATS)}; found {suffix!r}")
    return FORMATS[suffix]


def _parsed_json(where: str, content: bytes, hint: Callable[[bytes], str] = looks_like) -> Any:
    """The value in the text of a file, or of one of its lines, which `where` names; raises UserError, with what `hint`
    says of the text at its end, for none."""
    try:
        return json.loads(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise UserError(
            f"{where}: expected UTF-8 text, found byte {content[error.start]:#04x}{hint(content)}"
        ) from None
    except (ValueError, RecursionError) as error:  # ValueError, too, for a number of more than 4,300 digits
        raise UserError(f"{where}: broken JSON: {error}{hint(content)}") from None


def _read_jsonl(file: PromptFile, stream: IO[bytes]) -> Iterator[SourceRow]:
    is_first = True
    for number, line in enumerate(stream, start=1):
        where = f"{file.path}, line {number}"
        if number == 1:
            line = line.removeprefix(_BYTE_ORDER_MARK)
        if not line.strip():
            continue
        values = _parsed_json(where, line, functools.partial(line_hint, is_first=is_first))
        if not isinstance(values, dict):
            hint = line_hint(line, is_first)
            raise UserError(f"{where}: expected one JSON object per line, found {type(values).__name__}{hint}")
        is_first = False
        yield SourceRow(where, f"{file.label}:{number}", values)


def _read_json(file: PromptFile, stream: IO[bytes]) -> Iterator[SourceRow]:
    content = stream.read().removeprefix(_BYTE_ORDER_MARK)
    if not content.lstrip().startswith(b"["):
        if (only := whole_object(content)) is not None:
            if (found := boxed_rows(only)) is not None:
                raise UserError(f"{file.path}: expected an array of objects, or one object per line; found {found}")
            yield SourceRow(f"{file.path}, row 1", f"{file.label}:1", only)
            return
        yield from _read_jsonl(file, io.BytesIO(content))
        return
    rows = _parsed_json(file.path, content)
    for number, values in enumerate(rows, start=1):
        where = f"{file.path}, row {number}"
        if not isinstance(values, dict):
            raise UserError(f"{where}: expected a JSON object, found {type(values).__name__}")
        yield SourceRow(where, f"{file.label}:{number}", values)


def _read_parquet(file: PromptFile, stream: IO[bytes]) -> Iterator[SourceRow]:
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        table = pyarrow.parquet.ParquetFile(stream)
        for batch in table.iter_batches(batch_size=PARQUET_ROWS_PER_BATCH):
            for values in batch.to_pylist():
                number += 1
                yield SourceRow(f"{file.path}, row {number}", f"{file.label}:{number}", values)
    except pyarrow.ArrowException as error:
        stream.seek(0)
        hint = "" if number else looks_like(stream.read(64), cut_short="a Parquet file")
        raise UserError(f"{file.path}: not a readable Parquet file after row {number}: {error}{hint}") from None


def _read_csv(file: PromptFile, stream: IO[bytes]) -> Iterator[SourceRow]:
    csv.field_size_limit(LONGEST_CSV_FIELD)
    number = 0
    text = io.TextIOWrapper(stream, encoding="utf-8-sig", newline="")
    try:
        records = csv.reader(text, strict=True)
        header = next(records, [])
        if (separator := separator_of(header)) is not None:
            raise UserError(
                f"{file.path}, header: expected commas between the columns, found {separator}: {cut(header[0])}; "
                "write the file with commas, and quotes around what holds one"
            )
        if len(set(header)) < len(header):
            raise UserError(f"{file.path}, header: expected every column name once, found {cut(', '.join(header))}")
        for record in records:
            if not record:
                continue
            number += 1
            where = f"{file.path}, row {number}"
            if len(record) != len(header):
                raise UserError(f"{where}: expected {len(header)} fields as in the header, found {len(record)}")
            yield SourceRow(where, f"{file.label}:{number}", dict(zip(header, record, strict=True)))
    except csv.Error as error:
        raise UserError(f"{file.path}, row {number + 1}: broken CSV: {error}") from None
    except UnicodeDecodeError as error:
        hint = "" if number else looks_like(error.object[:64])
        raise UserError(f"{file.path}, near row {number + 1}: expected UTF-8 text: {error.reason}{hint}") from None
