"""How a model of the Hugging Face Hub is named: `organisation/name`, or `organisation/name@revision`."""

from __future__ import annotations

import re

# "organisation/name", the characters that the Hub allows; nothing like ../name or ./name.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A branch, a tag, a commit or refs/pr/7; no path that leads elsewhere.
REVISION = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)*")


def hub_model(name: str) -> tuple[str, str | None] | None:
    """The id and the revision (None: the main branch) that a name stands for; None where it is no name of the Hub."""
    identifier, separator, revision = name.partition("@")
    if not HUB_ID.fullmatch(identifier) or (separator and not REVISION.fullmatch(revision)):
        return None
    return identifier, revision or None
