"""The day that prompts tell where a chat template tells one: a setting, never the clock's."""

from __future__ import annotations

import datetime

DATE_STRING = "26 Jul 2024"
"""Told where nothing else is configured: the day that Llama 3.1's own template has."""

_FORMS = ("%d %b %Y", "%d %B %Y", "%Y-%m-%d", "%B %d, %Y", "%b %d, %Y")


def date_of(date_string: str) -> datetime.datetime:
    """The day (midnight) that a text names; raises ValueError where it names none in one of the usual forms."""
    for form in _FORMS:
        try:
            return datetime.datetime.strptime(date_string, form)
        except ValueError:
            continue
    raise ValueError(f"expected a date such as {DATE_STRING!r} or '2024-07-26', found {date_string!r}")
