"""How models and files of the Hugging Face Hub are named, `organisation/name` or `organisation/name@revision`, and what
of a model is on this machine."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeVar

from mipo_ray.terminal import say_error

Answer = TypeVar("Answer")

# Seconds before the Hub is asked again, where it asks for no other wait (Retry-After, up to the longest).
WAITS = (1.0, 2.0, 4.0, 8.0, 16.0)
LONGEST_WAIT = 120.0
_PASSING = frozenset({408, 429, 500, 502, 503, 504})  # statuses of HTTP

# "organisation/name", the characters that the Hub allows; nothing like ../name or ./name.
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
# A branch, a tag, a commit or refs/pr/7; no path that leads elsewhere.
REVISION = re.compile(r"(?!.*\.\.)\w[\w.-]*(/\w[\w.-]*)*")
# The one revision that stands for the same files tomorrow.
COMMIT = re.compile(r"[0-9a-f]{40}")
_HUB_FILE = re.compile(
    rf"hf://(?P<kind>datasets/|spaces/|models/)?(?!(?:buckets|datasets|spaces|models)/)(?P<repository>{HUB_ID.pattern})"
    r"(?:@(?P<revision>refs/[^/@]+/[^/@]+|[^/@]+))?/(?P<file>.+)"
)


@dataclass(frozen=True)
class HubFile:
    """A file of the Hub, or a glob of them, as `hf://` URLs name it. kind: "datasets/", "spaces/", "models/" or ""."""

    kind: str
    repository: str
    revision: str | None
    file: str

    @property
    def url(self) -> str:
        revision = "" if self.revision is None else f"@{self.revision}"
        return f"hf://{self.kind}{self.repository}{revision}/{self.file}"


def hub_file(url: str) -> HubFile | None:
    """The file of the Hub that a URL names; None for any other path or URL."""
    found = _HUB_FILE.fullmatch(url)
    return (
        None if found is None else HubFile(found["kind"] or "", found["repository"], found["revision"], found["file"])
    )


def at_commit(file: HubFile) -> HubFile:
    """The same file at the commit that its revision (None: the main branch) stands for now.

    Raises what the Hub's client raises where it cannot ask, after several tries; a commit is not asked about.
    """
    if file.revision is not None and COMMIT.fullmatch(file.revision):
        return file
    from huggingface_hub import HfApi

    kind = file.kind.removesuffix("s/") or "model"
    found = asked_again(lambda: HfApi().repo_info(file.repository, repo_type=kind, revision=file.revision))
    return replace(file, revision=found.sha)


def asked_again(ask: Callable[[], Answer]) -> Answer:
    """What `ask` gets from the Hub, asked again after a wait while the Hub has too many requests (429), fails (5xx) or
    cannot be reached; says so. Raises the last error, and any other one at once.

    The Hub's client does so itself for some of its requests, and not for the first one of a download, nor for a file.
    """
    for wait in WAITS:
        try:
            return ask()
        except Exception as error:
            if (problem := passing_problem(error)) is None:
                raise
            wait = min(LONGEST_WAIT, max(wait, _asked_wait(error)))
            say_error(f"the Hub does not answer as it should ({problem}); asking again in {wait:.0f} s")
            time.sleep(wait)
    return ask()


def passing_problem(error: BaseException) -> str | None:
    """What is wrong with the Hub, or the way to it, where that may pass; None for any other error."""
    each: BaseException | None = error
    while each is not None:
        status = getattr(getattr(each, "response", None), "status_code", None)
        if status in _PASSING:
            return f"HTTP {status}"
        # The base of what httpx raises on its way, by name: which httpx it is depends on the version of the client.
        if "TransportError" in {kind.__name__ for kind in type(each).__mro__}:
            return type(each).__name__
        each = each.__cause__
    return None


def _asked_wait(error: BaseException) -> float:
    """Seconds that the Hub asks to wait; 0 where it names none."""
    headers = getattr(getattr(error, "response", None) or getattr(error.__cause__, "response", None), "headers", {})
    asked = str(headers.get("Retry-After", ""))
    return float(asked) if asked.isdecimal() else 0.0


def hub_model(name: str) -> tuple[str, str | None] | None:
    """The id and the revision (None: the main branch) that a name stands for; None where it is no name of the Hub."""
    identifier, separator, revision = name.partition("@")
    if not HUB_ID.fullmatch(identifier) or (separator and not REVISION.fullmatch(revision)):
        return None
    return identifier, revision or None


def model_commit(name: str) -> str | None:
    """The commit of a model of the Hub: that of its name, of what is in the cache of this machine, or of the Hub now.

    None where `name` is no name of the Hub, or none of them can tell.
    """
    if (named := hub_model(name)) is None or Path(name).is_dir():
        return None
    identifier, revision = named
    if revision is not None and COMMIT.fullmatch(revision):
        return revision
    found = downloaded(name, "config.json")
    if found is not None and COMMIT.fullmatch(found.parent.name):  # snapshots/COMMIT/config.json
        return found.parent.name
    from huggingface_hub import HfApi

    try:
        return HfApi().repo_info(identifier, repo_type="model", revision=revision).sha
    except Exception:  # it is asked when a stage's work is done, which must not be lost for a record of it
        return None


def downloaded(name: str, file: str) -> Path | None:
    """A file of a model of the Hub in the cache of this machine; None where it was not downloaded, or `name` is no
    name of the Hub."""
    from huggingface_hub import try_to_load_from_cache

    if (named := hub_model(name)) is None:
        return None
    found = try_to_load_from_cache(named[0], file, revision=named[1])
    return Path(found) if isinstance(found, str) else None
