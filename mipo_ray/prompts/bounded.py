"""A stream of text -> its rows as text, none of which is longer than a row may be.

What is read ahead is bounded too, so that a small archive that holds one endless row costs no memory.
"""

from __future__ import annotations

import io
import re
from collections.abc import Iterator
from typing import IO

from mipo_ray.errors import UserError
from mipo_ray.tables.row_limit import MOST_VALUES, too_long, too_many

_CHUNK = 1024**2  # bytes that are read at a time
# What ends or begins something in JSON, outside and inside a string.
_OUTSIDE = re.compile(rb'["\[\]{},]')
_INSIDE = re.compile(rb'["\\]')
_STRING = re.compile(rb'"[^"\\]*+(?:\\.[^"\\]*+)*+"?', re.DOTALL)


def has_too_many(text: bytes) -> bool:
    """Whether a text of JSON has more values than a row may have."""
    return _commas(text) > MOST_VALUES and _commas(_STRING.sub(b"", text)) > MOST_VALUES


def _commas(text: bytes) -> int:
    return sum(text.count(mark) for mark in (b",", b"[", b"{"))


def lines_of(stream: IO[bytes], shown: str, longest: int) -> Iterator[bytes]:
    """The lines of a stream; raises UserError, with the line's number, for one of more than `longest` bytes."""
    number = 0
    while line := stream.readline(longest + 1):
        number += 1
        if len(line) > longest and not line.endswith(b"\n"):
            raise too_long(f"{shown}, line {number}", longest)
        yield line


def elements_of(beginning: bytes, stream: IO[bytes], shown: str, longest: int) -> Iterator[bytes]:
    """The elements of a JSON array as they stand there, whether they are JSON or not.

    beginning: what was read of it already, from its bracket on. Raises UserError, with the element's number, for one of
    more than `longest` bytes, for an array that does not end, and for more text behind it.
    """
    text = bytearray(beginning)
    start = at = text.index(b"[") + 1
    number, depth, is_string = 1, 0, False
    while True:
        found = (_INSIDE if is_string else _OUTSIDE).search(text, at)
        if found is None:
            at = max(at, len(text))
            if len(text) - start > longest:
                raise too_long(f"{shown}, row {number}", longest)
            del text[:start]
            at, start = at - start, 0
            if not (more := stream.read(_CHUNK)):
                raise UserError(f"{shown}, row {number}: broken JSON: the array does not end")
            text += more
            continue
        mark, at = found[0], found.end()
        if is_string:
            is_string = mark != b'"'
            at += mark == b"\\"  # the character behind it means nothing
        elif mark == b'"':
            is_string = True
        elif mark in b"[{":
            depth += 1
        elif mark in b"]}" and depth:
            depth -= 1
        elif not depth:
            if at - 1 - start > longest:
                raise too_long(f"{shown}, row {number}", longest)
            yield bytes(text[start : at - 1])
            start, number = at, number + 1
            if mark != b",":
                break
    rest = text[at:]
    while not rest.strip() and (rest := bytearray(stream.read(_CHUNK))):
        pass
    if rest:
        raise UserError(f"{shown}, behind row {number - 1}: broken JSON: expected the end of the file")


class CsvLines:
    """Lines for `csv.reader`, which takes as many as a row has. `begin` says which row comes next."""

    def __init__(self, text: io.TextIOWrapper, longest: int) -> None:
        self._text = text
        self._longest = longest
        self._where = ""
        self._size = self._commas = 0  # of the row that is being read; size: bytes

    def begin(self, where: str) -> None:
        self._where, self._size, self._commas = where, 0, 0

    def __iter__(self) -> CsvLines:
        return self

    def __next__(self) -> str:
        line = self._text.readline(self._longest + 1)
        self._size += len(line.encode("utf-8"))
        self._commas += line.count(",")
        if self._size > self._longest:
            raise too_long(self._where, self._longest)
        if self._commas > MOST_VALUES:
            raise too_many(self._where)
        if not line:
            raise StopIteration
        return line


class Again(io.RawIOBase):
    """A stream of which a beginning was read, from that beginning on."""

    def __init__(self, beginning: bytes, stream: IO[bytes]) -> None:
        self._beginning = io.BytesIO(beginning)
        self._stream = stream

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        found = self._beginning.read(len(buffer)) or self._stream.read(len(buffer))
        buffer[: len(found)] = found
        return len(found)
