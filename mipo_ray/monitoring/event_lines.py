"""The text of a metrics.jsonl as events. No Ray, so that a dry run can read those of earlier runs."""

from __future__ import annotations

import contextlib
import json
from typing import Any


def parse_events(text: str) -> list[dict[str, Any]]:
    """The events in the text of a metrics.jsonl; a last line that a kill cut off is left out."""
    events = []
    for line in text.splitlines():
        with contextlib.suppress(ValueError, RecursionError):
            events.append(json.loads(line))
    return events
