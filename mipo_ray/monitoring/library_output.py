"""What libraries print while a run is under way: a file below `logs/libraries` of the run directory takes it, so that
a terminal shows the run and nothing else.

Ray forwards the lines of its workers to the driver, C++ code writes to the descriptors 1 and 2 by itself, and warnings
and log lines go through Python's streams. All of them end in these two descriptors, which point to the file while the
block runs: what is written in the last moment of a process that dies is in it. What `terminal.say` says goes to the
streams that `apart` yields instead.
"""

from __future__ import annotations

import contextlib
import io
import os
import re
import secrets
import sys
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any, TextIO

from mipo_ray.errors import UserError
from mipo_ray.storage.local_files import new_file
from mipo_ray.storage.run_directory import LOGS, RunDirectory
from mipo_ray.terminal import guarded, plain, say_error

LIBRARIES = f"{LOGS}/libraries"
MOST_KEPT = 5  # files, the newest
MOST_BYTES = 20 * 1024**2  # of a file, the last ones, once the run has ended
LINES_SHOWN = 20  # of it, after an error

_COLOURS = re.compile(r"\x1b\[[0-9;]{0,20}m")


@dataclass(frozen=True)
class Streams:
    """Where people and machines look: what standard output and standard error were before the block."""

    out: TextIO
    err: TextIO


@contextlib.contextmanager
def apart(run: RunDirectory) -> Iterator[Streams]:
    """While the block runs, whatever is printed goes to a file of the run directory, for its owner alone; yields the
    streams for what is to be seen. The descriptors and Python's streams are as before afterwards.

    Of an error its last lines are shown, but not of a mistake of the user's, which says itself what is to be mended.
    Secrets are taken out of what passes through Python as it is written, and out of the rest when the block ends; what
    a killed run left is searched when the next one begins. An object store gets the file when the block ends.
    """
    _tidy(run)
    name = f"{LIBRARIES}/{time.strftime('%Y-%m-%dT%H%M%SZ', time.gmtime())}-{secrets.token_hex(4)}.log"
    path = _place(run, name)
    with new_file(path, 0o600) as file:
        try:
            with _redirected(file.fileno()) as streams:
                yield streams
        except Exception as error:
            if not isinstance(error, UserError):
                _show_end(path, run.path(name))
            raise
        finally:
            _keep(run, name, path)


def _place(run: RunDirectory, name: str) -> str:
    """Where the lines are written while the run is under way: an object store cannot append."""
    if not run.is_local:
        return os.path.join(tempfile.mkdtemp(prefix="mipo-ray-output-"), "libraries.log")
    path = run.path(name)
    os.makedirs(os.path.dirname(path), exist_ok=True)
    return path


@contextlib.contextmanager
def _redirected(target: int) -> Iterator[Streams]:
    """The descriptors 1 and 2, and Python's streams, write to `target`; yields streams to where they wrote before."""
    before = {1: sys.stdout, 2: sys.stderr}
    kept = {number: os.dup(number) for number in before}
    own = {number: _is_of(stream, number) for number, stream in before.items()}
    seen = {
        number: _stream(os.dup(kept[number]), stream.encoding) if own[number] else stream
        for number, stream in before.items()
    }
    _flush(before.values())
    try:
        for number in before:
            os.dup2(target, number)
        # A stream that is not one of the descriptors' (a notebook's, a test's) is replaced for the time.
        sys.stdout, sys.stderr = (
            stream if own[number] else guarded(_stream(os.dup(target))) for number, stream in before.items()
        )
        yield Streams(seen[1], seen[2])
    finally:
        _flush((sys.stdout, sys.stderr, *seen.values()))
        sys.stdout, sys.stderr = before.values()
        for number, descriptor in kept.items():
            os.dup2(descriptor, number)
            os.close(descriptor)


def _is_of(stream: Any, number: int) -> bool:
    """Whether what is written to a stream goes to the descriptor of that number."""
    try:
        return bool(stream.fileno() == number)
    except (OSError, ValueError, AttributeError):
        return False


def _stream(descriptor: int, encoding: str = "utf-8") -> TextIO:
    """A text stream over a descriptor of its own, which writes each line at once."""
    return io.TextIOWrapper(os.fdopen(descriptor, "wb"), encoding, errors="backslashreplace", line_buffering=True)


def _flush(streams: Iterable[TextIO]) -> None:
    for stream in streams:
        with contextlib.suppress(OSError, ValueError):  # a pipe that nobody reads any more
            stream.flush()


def _show_end(path: str, place: str) -> None:
    """Shows the last lines of what was printed; `place`: where it will lie."""
    lines = [line for line in _read(path).splitlines() if line.strip()]
    if lines:
        shown = "\n".join(f"  {line}" for line in lines[-LINES_SHOWN:])
        say_error(f"the last lines that libraries printed (all of them: {place}):\n{shown}")


def _read(path: str) -> str:
    """The text of the file as it may be shown: lines without colours, control characters and secrets."""
    with open(path, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - MOST_BYTES))
        text = file.read().decode("utf-8", errors="replace")
    return _clean(text)


def _clean(text: str) -> str:
    # A progress bar writes over its own line: of each such line the last state is what one would have seen.
    text = re.sub(r"[^\n]*\r(?=[^\n])", "", _COLOURS.sub("", text.replace("\r\n", "\n")))
    return plain(text.replace("\r", ""))


def _keep(run: RunDirectory, name: str, path: str) -> None:
    """Brings the file to its place, without secrets; an empty one is removed. What fails here hides no error."""
    with contextlib.suppress(UserError, OSError):
        text = _read(path)
        if text.strip():
            run.write_text(name, text)
        if text.strip() and run.is_local:
            return
        os.remove(path)
        for directory in (LIBRARIES, LOGS) if run.is_local else ():
            os.rmdir(run.path(directory))  # where nothing else is in it
        if not run.is_local:
            os.rmdir(os.path.dirname(path))


def _tidy(run: RunDirectory) -> None:
    """Leaves room for one more file among the newest, and searches those that a killed run left for secrets."""
    with contextlib.suppress(UserError, OSError):
        names = sorted(run.list_files(LIBRARIES))
        for old in names[: max(0, len(names) - MOST_KEPT + 1)]:
            run.remove(f"{LIBRARIES}/{old}")
        for left in names[max(0, len(names) - MOST_KEPT + 1) :] if run.is_local else ():
            path = run.path(LIBRARIES, left)
            if not os.path.islink(path):
                run.write_text(f"{LIBRARIES}/{left}", _read(path))
