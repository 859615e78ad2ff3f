"""Processes of an engine that must not outlive the process which started them, however that ends."""

from __future__ import annotations

import subprocess
from collections.abc import Iterable

# Reads until nobody is left who could write, and then kills.
_WAIT_AND_KILL = 'cat >/dev/null; kill -KILL "$@" 2>/dev/null'


class OrphanGuard:
    """Kills processes as soon as this one is gone.

    A process that is killed (by Ray's memory monitor, by the kernel where memory runs out) ends nothing itself, and the
    core of a vLLM engine does not notice (0.29): it would keep its memory, for want of which its actor was killed.
    """

    def __init__(self, process_ids: Iterable[int]) -> None:
        self._guard = subprocess.Popen(
            ["sh", "-c", _WAIT_AND_KILL, "sh", *map(str, process_ids)],
            stdin=subprocess.PIPE,  # which closes with this process
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a signal to the group of this process must not end its guard
        )

    def dismiss(self) -> None:
        """For a process that has ended its children itself: their numbers may be another's by and by."""
        self._guard.kill()
        self._guard.communicate()
