"""How models and files of the Hugging Face Hub are named, `organisation/name` or `organisation/name@revision`, and what
of a model is on this machine."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from pathlib import Path

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

    Raises what the Hub's client raises where it cannot ask; a commit is not asked about.
    """
    if file.revision is not None and COMMIT.fullmatch(file.revision):
        return file
    from huggingface_hub import HfApi

    kind = file.kind.removesuffix("s/") or "model"
    return replace(file, revision=HfApi().repo_info(file.repository, repo_type=kind, revision=file.revision).sha)


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
