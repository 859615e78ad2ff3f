"""The errors a user can mend: printed as a message without a traceback, exit code 2."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from mipo_ray.redaction import redacted, redacted_values

MOST_SHOWN = 200  # characters
MOST_LINES = 30
_LONGEST_SECRET = 4000  # characters, of which half is not known as a secret


class UserError(ValueError):
    """Something in the configuration, the input files or the cluster that the user can mend.

    The message names the file, row and field, what was expected and what was found; secrets in it are not shown.
    """

    def __init__(self, message: str) -> None:
        super().__init__(redacted(message))


def brief(value: object, most: int = MOST_SHOWN) -> str:
    """A value that was found, for a message: as Python writes it, on one line, cut after `most` characters."""
    try:
        text = repr(redacted_values(value))
    except (ValueError, RecursionError):  # Python writes no whole number of more than 4,300 digits
        text = f"{type(value).__name__} that is too long to show"
    return cut(text, most)


def cut(text: str, most: int = MOST_SHOWN) -> str:
    """A text for a message, cut after `most` characters."""
    start = redacted(text[: most + _LONGEST_SECRET])
    return start if len(text) <= most else f"{start[:most]}... ({len(text):,} characters)"


def few(items: Sequence[Any], line_of: Callable[[Any], str]) -> str:
    """The lines of a message about several things, of the first `MOST_LINES` of them, and how many more there are."""
    more = [f"and {len(items) - MOST_LINES:,} more"] if len(items) > MOST_LINES else []
    return "\n".join([*map(line_of, items[:MOST_LINES]), *more])
