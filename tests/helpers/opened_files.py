"""Counts how often a file is opened by any process of this machine (Linux's inotify)."""

from __future__ import annotations

import ctypes
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

IN_OPEN = 0x20
IN_NONBLOCK = 0x800
EVENT = struct.Struct("iIII")  # watch, mask, cookie, length of the name that follows


class OpenCounter:
    """How often the watched file was opened since the last look."""

    def __init__(self, descriptor: int):
        self._descriptor = descriptor

    def take(self) -> int:
        try:
            events = os.read(self._descriptor, 1 << 16)
        except BlockingIOError:
            return 0
        count = position = 0
        while position < len(events):
            _, mask, _, length = EVENT.unpack_from(events, position)
            count += bool(mask & IN_OPEN)
            position += EVENT.size + length
        return count


@contextmanager
def count_opens(file: Path) -> Iterator[OpenCounter]:
    """Watches one file for the time of the block."""
    libc = ctypes.CDLL(None, use_errno=True)
    descriptor = libc.inotify_init1(IN_NONBLOCK)
    if descriptor < 0 or libc.inotify_add_watch(descriptor, str(file).encode(), IN_OPEN) < 0:
        raise OSError(ctypes.get_errno(), "inotify")
    try:
        yield OpenCounter(descriptor)
    finally:
        os.close(descriptor)
