"""The prompt files that a path stands for, on any filesystem. Nothing here imports ray."""

from __future__ import annotations

import os
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from glob import has_magic
from typing import Any, cast

from mipo_ray.errors import UserError
from mipo_ray.examples import bundled_path
from mipo_ray.models.hub import at_commit, hub_file
from mipo_ray.paths import local_matches, open_path
from mipo_ray.prompts.packed import COMPRESSIONS

BUNDLED = "bundled:"
FORMATS = {".jsonl": "JSONL", ".ndjson": "JSONL", ".json": "JSON", ".parquet": "Parquet", ".csv": "CSV"}


@dataclass(frozen=True)
class PromptFile:
    """One file: `path` as a worker can open it and as messages show it; `label` names it inside generated ids."""

    path: str
    label: str
    format: str


def find_files(path: str, key: str = "prompts.path") -> tuple[PromptFile, ...]:
    """The files that `path` (a file, a glob, or bundled:NAME) stands for, sorted by name; those of the Hub with the
    commit that its revision stands for now, so that whoever reads them later reads the same.

    `key` is the configuration key that error messages name. Raises UserError when nothing matches, the storage cannot
    be opened, or a suffix is none of FORMATS.
    """
    if path.startswith(BUNDLED):
        # Kept symbolic: the package may lie elsewhere on another machine of the cluster.
        return (PromptFile(path, bundled_path(path.removeprefix(BUNDLED)).name, "JSONL"),)
    try:
        on_hub = hub_file(path)
        names = _matching_files(path if on_hub is None else at_commit(on_hub).url, key)
    except UserError:
        raise
    except Exception as error:  # each storage client raises exceptions of its own
        raise UserError(f"{key}: cannot open {path}: {type(error).__name__}: {error}") from None
    if not names:
        raise UserError(f"{key}: no file matches {path}")
    common = posixpath.dirname(names[0]) if len(names) == 1 else posixpath.commonpath(names)
    return tuple(PromptFile(name, posixpath.relpath(name, common), _format_of(name, key)) for name in names)


def commit_of(files: Sequence[PromptFile]) -> str | None:
    """The commit of files of the Hub, which are of one repository; None for others."""
    on_hub = hub_file(files[0].path) if files else None
    return None if on_hub is None else on_hub.revision


def _matching_files(path: str, key: str) -> list[str]:
    filesystem, root = open_path(path)
    is_local = "file" in _protocols(filesystem)
    if filesystem.isdir(root):
        raise UserError(f"{key}: {path} is a directory; expected a file or a glob such as {path.rstrip('/')}/*.jsonl")
    if filesystem.isfile(root):
        matches = [root]
    elif is_local:
        matches, broken = local_matches(root)
        if not matches and broken:
            raise UserError(f"{key}: no file matches {path}; {broken[0]} is a link to a file that is not there")
    elif has_magic(root):
        found = cast(dict[str, dict[str, Any]], filesystem.glob(root, detail=True))
        matches = [name for name, info in found.items() if info["type"] == "file"]
    else:
        matches = []
    # Names that start with _ or . are markers of the writers (_SUCCESS, .crc), not data.
    matches = [name for name in matches if name == root or name.split("/")[-1][0] not in "_."]
    return sorted(matches) if is_local else sorted(filesystem.unstrip_protocol(name) for name in matches)


def _protocols(filesystem: Any) -> tuple[str, ...]:
    return (filesystem.protocol,) if isinstance(filesystem.protocol, str) else tuple(filesystem.protocol)


def _format_of(name: str, key: str) -> str:
    stem, suffix = os.path.splitext(name.lower())
    if suffix in COMPRESSIONS and os.path.splitext(stem)[1] != ".parquet":
        suffix = os.path.splitext(stem)[1]
    if suffix not in FORMATS:
        raise UserError(f"{key}: {name}: expected a name that ends in one of {', '.join(FORMATS)}; found {suffix!r}")
    return FORMATS[suffix]
