"""Opens a file, packed or not, so that unpacking it holds no more memory than is good for it."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import io
import lzma
import zlib
from collections.abc import Iterator
from typing import IO, Any, cast

COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
UNREADABLE = (OSError, EOFError, zlib.error, lzma.LZMAError)  # what a damaged file raises

_CHUNK = 64 * 1024  # bytes that are read at a time
# Bytes that an xz file may ask for: twice what the strongest preset needs. A file can name any up to 4 GiB.
_MOST_XZ = 128 * 1024**2


@contextlib.contextmanager
def open_unpacked(filesystem: Any, name: str) -> Iterator[IO[bytes]]:
    """The file of a filesystem of fsspec's, unpacked as its suffix says; UNREADABLE where it cannot be."""
    suffix = next((suffix for suffix in COMPRESSIONS if name.lower().endswith(suffix)), "")
    with filesystem.open(name, "rb") as packed:
        if suffix == ".gz":
            yield cast(IO[bytes], gzip.GzipFile(fileobj=packed))
        elif suffix == ".bz2":
            yield cast(IO[bytes], bz2.BZ2File(packed))
        elif suffix == ".xz":
            yield io.BufferedReader(_Xz(packed))
        elif suffix == ".zst":
            import pyarrow

            # Python 3.11 has no zstd; this one refuses to hold more than 128 MiB.
            yield io.BufferedReader(pyarrow.CompressedInputStream(packed, "zstd"))
        else:
            yield packed


class _Xz(io.RawIOBase):
    """As `lzma.LZMAFile`, which sets no limit."""

    def __init__(self, packed: IO[bytes]) -> None:
        self._packed = packed
        self._decoder = lzma.LZMADecompressor(lzma.FORMAT_AUTO, _MOST_XZ)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        while True:
            data = b""
            if self._decoder.eof:  # files may be strung together, with zeros between them
                data = self._decoder.unused_data or self._packed.read(_CHUNK)
                while data and not (data := data.lstrip(b"\0")):
                    data = self._packed.read(_CHUNK)
                if not data:
                    return 0
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_AUTO, _MOST_XZ)
            elif self._decoder.needs_input and not (data := self._packed.read(_CHUNK)):
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            if found := self._decoder.decompress(data, len(buffer)):
                buffer[: len(found)] = found
                return len(found)
