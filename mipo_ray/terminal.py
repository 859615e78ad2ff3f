"""What a command prints: one place, without the control characters of what others wrote, and without secrets.

Models, servers and files may send escape sequences, by which a terminal changes its title, writes over lines that were
printed before, or fills the clipboard. Line ends and tabs stay; other control characters are shown as Python writes
them (`\\x1b`), and so are those that turn the direction of a line around.
"""

from __future__ import annotations

import contextlib
import json
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from typing import Any

from mipo_ray.redaction import redacted, redacted_values

MOST_OF_A_LINE = 20_000  # characters

# C0 without tab and line feed, DEL, C1; separators of lines; what turns the direction around; half of a pair.
_CONTROL = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069\ufff9-\ufffb\ud800-\udfff]")
# The same; but what libraries write on purpose stays: colours, and the carriage return of a progress bar.
_CONTROL_OF_LIBRARIES = re.compile(rf"(?P<kept>\x1b\[[0-9;]{{0,20}}m|\r)|{_CONTROL.pattern}")


def plain(text: str) -> str:
    """The text as it may be printed: no secrets and control characters, no line longer than `MOST_OF_A_LINE`."""
    lines = _CONTROL.sub(lambda found: ascii(found[0])[1:-1], redacted(text).replace("\r\n", "\n")).split("\n")
    return "\n".join(f"{line[:MOST_OF_A_LINE]}..." if len(line) > MOST_OF_A_LINE else line for line in lines)


# Takes what is said, with its line end, and whether it is an error; None: it is printed.
Listener = Callable[[str, bool], None]
_listener: Listener | None = None


def say(text: str = "", *, end: str = "\n") -> None:
    """Prints a text at once, or gives it to who listens."""
    _say(plain(text) + end, is_error=False)


def say_error(text: str) -> None:
    """Prints a text on standard error, or gives it to who listens."""
    _say(plain(text) + "\n", is_error=True)


def _say(text: str, *, is_error: bool) -> None:
    if _listener is not None:
        _listener(text, is_error)
    else:
        print(text, end="", file=sys.stderr if is_error else sys.stdout, flush=True)


@contextlib.contextmanager
def said_to(listener: Listener) -> Iterator[None]:
    """While the block runs, what is said in this process goes to `listener` and is not printed."""
    global _listener
    before, _listener = _listener, listener
    try:
        yield
    finally:
        _listener = before


def say_json(value: Any) -> None:
    """Prints a value of plain types as JSON for programs: ASCII alone, without secrets, lines as long as they are."""
    print(json.dumps(redacted_values(value), indent=2), flush=True)


def guard_tracebacks() -> None:
    """The traceback of an exception that ends this process is printed as any other text."""
    sys.excepthook = lambda *error: say_error("".join(traceback.format_exception(*error)).rstrip())


@contextlib.contextmanager
def guarded_streams() -> Iterator[None]:
    """While the block runs, whatever prints to standard output and error prints no control characters and no secrets.

    That is for what does not come through `say`: lines of Ray's workers, warnings and log lines of libraries.
    """
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (guarded(stream) for stream in before)
    try:
        yield
    finally:
        sys.stdout, sys.stderr = before


def guarded(stream: Any) -> Any:
    """A text stream as `guarded_streams` puts it before another one."""
    return _Guarded(stream)


class _Guarded:
    """A text stream that shows control characters as Python writes them; else the stream behind it."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream

    def write(self, text: str) -> int:
        self._stream.write(
            _CONTROL_OF_LIBRARIES.sub(lambda found: found["kept"] or ascii(found[0])[1:-1], redacted(text))
        )
        return len(text)

    def writelines(self, lines: Any) -> None:
        for line in lines:
            self.write(line)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)

    def __enter__(self) -> _Guarded:
        return self

    def __exit__(self, *_: object) -> None:
        return None

    def __iter__(self) -> Iterator[str]:
        return iter(self._stream)
