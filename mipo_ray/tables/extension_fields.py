"""Columns of a Parquet file that ask to be read by a program.

Arrow lets a field say, in its metadata, that it holds an extension type, and hands such a column to whatever the
process has registered under that name. `import ray.data` registers "ray.data.arrow_pickled_object", which unpickles
every value, and types whose settings may be unpickled as soon as the schema is read. So the metadata is looked at as
bytes, before Arrow sees the file: in the footer, where writers keep their Arrow schema (a FlatBuffer).
"""

from __future__ import annotations

import base64
import binascii
import struct
from collections.abc import Iterator

import pyarrow as pa

from mipo_ray.errors import UserError, brief, cut
from mipo_ray.tables.footer import Footer

_EXTENSION = b"ARROW:extension:name"
_SCHEMA = b"ARROW:schema"
# Arrow's own C++ reads these two, as plain text and 16 bytes; Parquet has types of its own that it makes them of.
_HARMLESS = ("arrow.json", "arrow.uuid")
_MOST_ENTRIES = 1_000_000  # fields, and keys of their metadata, each as often as it is named: they may be shared
_DEEPEST = 64  # levels of nested fields
_MOST_SHOWN = 200  # bytes of a name

# Numbers of fields in Arrow's Message, Schema and Field.
_MESSAGE_HEADER, _SCHEMA_FIELDS = 2, 1
_FIELD_NAME, _FIELD_CHILDREN, _FIELD_METADATA = 0, 5, 6


def refuse_extension_fields(footer: Footer, shown: str) -> None:
    """Raises UserError, naming the file as `shown` and the column, for a Parquet file with an extension field.

    At any depth. Raises ArrowInvalid for a schema of Arrow's that is none.
    """
    # Arrow takes one of several, whichever: all are looked at.
    for schema in [value for key, value in footer.metadata if key == _SCHEMA]:
        try:
            found = list(_extensions(schema))
        except (NotAFlatBuffer, struct.error, binascii.Error) as error:
            raise pa.ArrowInvalid(f"{cut(str(error))}: not the footer of a Parquet file") from None
        for path, name in found:
            _refuse(shown, path, name)


def refuse_extension_types(schema: pa.Schema, shown: str) -> None:
    """As `refuse_extension_fields`, of a schema that Arrow has read: also what Arrow makes of Parquet's own types."""
    for field in schema:
        _refuse_type(field.type, field.name, shown)


def _refuse_type(kind: pa.DataType, path: str, shown: str) -> None:
    if isinstance(kind, pa.BaseExtensionType):
        if kind.extension_name not in _HARMLESS:
            _refuse(shown, path, kind.extension_name)
        kind = kind.storage_type
    if pa.types.is_dictionary(kind):
        _refuse_type(kind.value_type, path, shown)
    for number in range(kind.num_fields):
        _refuse_type(kind.field(number).type, f"{path}.{kind.field(number).name}", shown)


def _refuse(shown: str, path: str, name: str) -> None:
    raise UserError(
        f"{shown}, column {brief(path)}: expected plain data, found the extension type {brief(name)}, which a program "
        "reads and which could run one; write the column as the plain type that it stores"
    )


def _extensions(encoded: bytes) -> Iterator[tuple[str, str]]:
    """Path and name of every extension field in an Arrow schema as Parquet keeps it: base64 of an IPC message."""
    message = base64.b64decode(encoded, validate=True)
    start = 8 if message[:4] == b"\xff\xff\xff\xff" else 4  # files of 2019 have the length alone before it
    buffer = _FlatBuffer(message[start:])
    schema = buffer.table_in(buffer.table_at(0), _MESSAGE_HEADER)
    waiting = [(field, "", 0) for field in buffer.tables_in(schema, _SCHEMA_FIELDS)]
    while waiting:
        field, above, depth = waiting.pop()
        if depth > _DEEPEST:
            raise NotAFlatBuffer("its schema is nested too deep")
        path = f"{above}{buffer.text_in(field, _FIELD_NAME).decode('utf-8', errors='replace')}"
        for entry in buffer.tables_in(field, _FIELD_METADATA):
            name = buffer.text_in(entry, 1).decode("utf-8", errors="replace")
            if buffer.text_in(entry, 0) == _EXTENSION and name not in _HARMLESS:
                yield path, name
        waiting += [(child, f"{path}.", depth + 1) for child in buffer.tables_in(field, _FIELD_CHILDREN)]


class NotAFlatBuffer(ValueError):
    """The bytes are no Arrow schema."""


class _FlatBuffer:
    """Tables of a FlatBuffer by their position in bytes and the number of a field; an absent field is empty.

    https://flatbuffers.dev/internals: a table begins with the distance to its list of where its fields are.
    """

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._entries = 0  # that were asked for

    def table_at(self, place: int) -> int:
        """Where the table, text or list lies that the offset at `place` leads to."""
        return place + self._number("<I", place)

    def table_in(self, table: int, field: int) -> int:
        if (place := self._place(table, field)) is None:
            raise NotAFlatBuffer("it has no Arrow schema")
        return self.table_at(place)

    def tables_in(self, table: int, field: int) -> list[int]:
        if (place := self._place(table, field)) is None:
            return []
        first = self.table_at(place)
        size = self._number("<I", first)
        self._entries += size
        if self._entries > _MOST_ENTRIES:
            raise NotAFlatBuffer("its schema has too many fields")
        return [self.table_at(first + 4 + 4 * number) for number in range(size)]

    def text_in(self, table: int, field: int) -> bytes:
        """The text's first _MOST_SHOWN bytes."""
        if (place := self._place(table, field)) is None:
            return b""
        first = self.table_at(place)
        return self._data[first + 4 : first + 4 + min(_MOST_SHOWN, self._number("<I", first))]

    def _place(self, table: int, field: int) -> int | None:
        fields = table - self._number("<i", table)
        place = 4 + 2 * field
        offset = self._number("<H", fields + place) if place < self._number("<H", fields) else 0
        return table + offset if offset else None

    def _number(self, kind: str, place: int) -> int:
        if place < 0:
            raise NotAFlatBuffer("its schema leads nowhere")
        return int(struct.unpack_from(kind, self._data, place)[0])
