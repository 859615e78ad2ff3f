"""How a model of the Hugging Face Hub is named, `organisation/name` or `organisation/name@revision`, and what of it is
on this machine."""

from __future__ import annotations

import re
from pathlib import Path

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


def downloaded(name: str, file: str) -> Path | None:
    """A file of a model of the Hub in the cache of this machine; None where it was not downloaded, or `name` is no
    name of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    if (named := hub_model(name)) is None:
        return None
    found = try_to_load_from_cache(named[0], file, revision=named[1])
    return Path(found) if isinstance(found, str) else None
