"""Thrift's compact encoding, in which Parquet writes its footer and the headers of its pages.

A value of any structure becomes a dict of field number -> value, so that what is looked for is found without a
description of the rest. https://github.com/apache/thrift/blob/master/doc/specs/thrift-compact-protocol.md
"""

from __future__ import annotations

from typing import Any

_DEEPEST = 32  # levels; Parquet's own structures have fewer than ten

_TRUE, _FALSE, _BYTE, _DOUBLE, _BINARY, _LIST, _SET, _MAP, _STRUCT, _UUID = 1, 2, 3, 7, 8, 9, 10, 11, 12, 13
_NUMBERS = (4, 5, 6)
_FIXED = {_BYTE: 1, _DOUBLE: 8, _UUID: 16}  # bytes


class NotThrift(ValueError):
    """The bytes are no structure in this encoding, or end before it does."""


def read_struct(data: bytes, start: int = 0) -> tuple[dict[int, Any], int]:
    """The structure that begins at byte `start`, and the byte behind it. Raises NotThrift."""
    reader = _Reader(data, start)
    try:
        return reader.struct(0), reader.position
    except IndexError:
        raise NotThrift("it ends too early") from None


class _Reader:
    def __init__(self, data: bytes, position: int) -> None:
        self._data = data
        self.position = position

    def struct(self, depth: int) -> dict[int, Any]:
        if depth > _DEEPEST:
            raise NotThrift("it is nested too deep")
        fields: dict[int, Any] = {}
        number = 0
        while header := self._byte():
            number = number + (header >> 4) if header >> 4 else self._number()
            kind = header & 0x0F
            fields[number] = kind == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)
        return fields

    def _value(self, kind: int, depth: int) -> Any:
        if kind in _NUMBERS:
            return self._number()
        if kind == _BINARY:
            return self._bytes(self._unsigned())
        if kind == _STRUCT:
            return self.struct(depth + 1)
        if kind in (_LIST, _SET):
            return self._list(depth + 1)
        if kind == _MAP:
            return self._map(depth + 1)
        if kind in _FIXED:
            return self._bytes(_FIXED[kind])
        raise NotThrift(f"it has a value of kind {kind}")

    def _element(self, kind: int, depth: int) -> Any:
        return self._byte() == _TRUE if kind in (_TRUE, _FALSE) else self._value(kind, depth)

    def _list(self, depth: int) -> list[Any]:
        header = self._byte()
        size = header >> 4 if header >> 4 < 15 else self._unsigned()
        if depth > _DEEPEST or size > len(self._data):  # an element takes a byte at least
            raise NotThrift("it has a list that is too long or too deep")
        return [self._element(header & 0x0F, depth) for _ in range(size)]

    def _map(self, depth: int) -> list[tuple[Any, Any]]:
        size = self._unsigned()
        if depth > _DEEPEST or size > len(self._data):
            raise NotThrift("it has a map that is too long or too deep")
        kinds = self._byte() if size else 0
        return [(self._element(kinds >> 4, depth), self._element(kinds & 0x0F, depth)) for _ in range(size)]

    def _byte(self) -> int:
        byte = self._data[self.position]
        self.position += 1
        return byte

    def _bytes(self, size: int) -> bytes:
        end = self.position + size
        if end > len(self._data):
            raise NotThrift("it ends too early")
        found = self._data[self.position : end]
        self.position = end
        return found

    def _unsigned(self) -> int:
        value = shift = 0
        while True:
            byte = self._byte()
            value |= (byte & 0x7F) << shift
            if byte < 0x80:
                return value
            shift += 7
            if shift > 63:
                raise NotThrift("it has a number of more than 64 bits")

    def _number(self) -> int:
        value = self._unsigned()
        return (value >> 1) ^ -(value & 1)
