"""The footer of a Parquet file, read without Arrow: what it says of the file, before anything of the file is believed.

Arrow makes types of the metadata as it reads a footer, and where one is damaged some of its ways to the sizes in it end
the process. https://github.com/apache/parquet-format/blob/master/src/main/thrift/parquet.thrift
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import IO, Any

import pyarrow as pa

from mipo_ray.errors import cut
from mipo_ray.tables.thrift import NotThrift, read_struct

_TAIL = 64 * 1024  # bytes that are read at the end of a file; most footers fit
_LONGEST = 64 * 1024**2  # bytes of a footer; that of a table of thousands of row groups and columns has some MiB
_MAGIC = b"PAR1"
_PAGE_HEADERS = 4096, 16 * 1024**2  # bytes; most are short, and Arrow reads none that is longer

# Numbers of fields: of FileMetaData, RowGroup, ColumnChunk, ColumnMetaData, KeyValue and PageHeader.
_GROUPS, _METADATA = 4, 5
_COLUMNS, _ROWS = 1, 3
_COLUMN_METADATA = 3
_VALUES, _UNCOMPRESSED, _DATA_PAGE, _DICTIONARY_PAGE = 5, 6, 9, 11  # a dictionary stands before the data
_KEY, _VALUE = 1, 2
_PAGE_TYPE, _PAGE_SIZE = 1, 2
_IS_DICTIONARY = 2  # of a page's type


@dataclass(frozen=True)
class RowGroup:
    """Rows that are stored together: how many, their bytes when decompressed, their values (nulls too), and where each
    column begins."""

    rows: int
    size: int
    values: int
    columns: tuple[int, ...]


@dataclass(frozen=True)
class Footer:
    """What a file says of itself: its groups of rows, and keys with their values, of which one may come twice."""

    groups: tuple[RowGroup, ...]
    metadata: tuple[tuple[bytes, bytes], ...]


def read_footer(file: IO[bytes] | pa.NativeFile) -> Footer:
    """The footer of an open file. Raises ArrowInvalid for what is no Parquet file."""
    try:
        found, _ = read_struct(_footer_bytes(file))
        return Footer(
            groups=tuple(_row_group(group) for group in found.get(_GROUPS, [])),
            metadata=tuple((_bytes(entry, _KEY), _bytes(entry, _VALUE)) for entry in found.get(_METADATA, [])),
        )
    except (NotThrift, AttributeError, TypeError, LookupError) as error:
        raise pa.ArrowInvalid(f"{cut(str(error))}: not the footer of a Parquet file") from None


def dictionary_size(file: IO[bytes], start: int) -> int:
    """Bytes, decompressed, of the dictionary of a column that begins at `start`, as the header of its first page says;
    0 without one. Raises ArrowInvalid for what is no page."""
    for length in _PAGE_HEADERS:
        file.seek(start)
        try:
            page, _ = read_struct(file.read(length))
            return _number(page, _PAGE_SIZE) if page.get(_PAGE_TYPE) == _IS_DICTIONARY else 0
        except NotThrift as error:
            problem = error
    raise pa.ArrowInvalid(f"byte {start}: {problem}: not the header of a page")


def _footer_bytes(file: Any) -> bytes:
    file.seek(0, 2)
    size = file.tell()
    file.seek(max(0, size - _TAIL))
    tail = file.read(min(size, _TAIL))
    length = int.from_bytes(tail[-8:-4], "little")
    if tail[-4:] != _MAGIC or length + 12 > size:
        raise NotThrift("it does not end as one")
    if length > _LONGEST:
        raise NotThrift(f"it has {length:,} bytes")
    if length + 8 > len(tail):
        file.seek(size - length - 8)
        tail = file.read(length + 8)
    return bytes(tail[-length - 8 : -8])


def _row_group(group: dict[int, Any]) -> RowGroup:
    columns = [column[_COLUMN_METADATA] for column in group.get(_COLUMNS, []) if _COLUMN_METADATA in column]
    return RowGroup(
        rows=_number(group, _ROWS),
        size=sum(_number(column, _UNCOMPRESSED) for column in columns),
        values=sum(_number(column, _VALUES) for column in columns),
        columns=tuple(
            _number(column, _DICTIONARY_PAGE if column.get(_DICTIONARY_PAGE) else _DATA_PAGE) for column in columns
        ),
    )


def _number(found: dict[int, Any], field: int) -> int:
    if type(number := found.get(field)) is not int or number < 0:
        raise NotThrift(f"it has no number in field {field}")
    return number


def _bytes(found: dict[int, Any], field: int) -> bytes:
    if not isinstance(text := found.get(field, b""), bytes):
        raise NotThrift(f"it has no text in field {field}")
    return text
