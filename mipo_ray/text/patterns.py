"""Regular expressions that users write, by RE2, whose time grows linearly with the text that is searched.

Python's own engine, like every one that goes back and tries again, takes 2^n steps for some patterns over n characters:
`(a+)+$` took 4.7 s over 26. RE2 knows no look-ahead, look-behind and back-references, which cannot be had in linear
time; `\\w`, `\\d`, `\\s` and `\\b` know ASCII only there, and `\\p{L}`, `\\p{Han}` and others know Unicode.
"""

from __future__ import annotations

import functools
from typing import Any

import re2

MOST_CHARACTERS = 5000  # of one pattern
_MOST_BYTES = 8 << 20  # that a compiled pattern and its search may take


def compiled(pattern: str) -> Any:
    """A pattern ready to `search`; raises ValueError, which says why, for one that RE2 does not take."""
    if len(pattern) > MOST_CHARACTERS:
        raise ValueError(f"expected at most {MOST_CHARACTERS:,} characters, found {len(pattern):,}")
    return _compiled(pattern)


def is_found(pattern: str, text: str) -> bool:
    """Whether the pattern matches anywhere in the text."""
    # What is no Unicode (half of a surrogate pair) is searched as a question mark.
    return compiled(pattern).search(text.encode("utf-8", "replace").decode("utf-8")) is not None


@functools.lru_cache(maxsize=64)
def _compiled(pattern: str) -> Any:
    options = re2.Options()
    options.log_errors = False
    options.max_mem = _MOST_BYTES
    try:
        return re2.compile(pattern, options)
    except re2.error as error:
        reason = error.args[0].decode("utf-8", "replace") if isinstance(error.args[0], bytes) else str(error)
    except UnicodeEncodeError:
        reason = "it holds half of a surrogate pair"
    hint = "; RE2 has no look-ahead, look-behind and back-references" if "perl operator" in reason else ""
    raise ValueError(f"{reason}{hint}")
