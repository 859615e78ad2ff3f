"""A path or URL as the user wrote it -> a filesystem and the path on it, whatever characters its names have."""

from __future__ import annotations

import atexit
import fnmatch
import os
import shutil
import tempfile
from collections.abc import Iterator
from glob import has_magic
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem

# How S3 is asked. botocore sends a request again after an error of the server, a lost connection or a wait that was too
# long, up to 8 times in all with waits of up to 1, 2, 4, ... 20 s in between; s3fs does so five times where S3 asks for
# fewer requests, or a body is cut off. Listings are not kept: other processes write to the same place.
S3_CLIENT: dict[str, Any] = {
    "config_kwargs": {
        "connect_timeout": 5,  # seconds, as the next
        "read_timeout": 15,
        "retries": {"mode": "standard", "total_max_attempts": 8},
    },
    "use_listings_cache": False,
}


def open_path(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a local path or a URL, and the path on it; a local one is made absolute.

    Raises what the filesystem's client raises for a URL that it cannot open.
    """
    if "://" in url:
        return url_to_fs(url, **{protocol: S3_CLIENT for protocol in ("s3", "s3a") if f"{protocol}://" in url})
    # Asked for a path, fsspec would read "a::b" as two filesystems of which one wraps the other, and open "a".
    return LocalFileSystem(), os.path.abspath(os.path.expanduser(url))


def plain_path(directory: str) -> str:
    """The path to a local directory, or a link to it where a program that takes paths for patterns would not find it.

    vLLM looks for weights and DeepSpeed for checkpoints by `glob`, which reads brackets, question marks and stars. The
    link is there until this process ends.
    """
    if not has_magic(directory):
        return directory
    place = tempfile.mkdtemp(prefix="mipo-ray-link-")
    atexit.register(shutil.rmtree, place, ignore_errors=True)
    link = os.path.join(place, "directory")
    os.symlink(os.path.abspath(directory), link)
    return link


def local_matches(pattern: str) -> tuple[list[str], list[str]]:
    """The files of this machine that a glob pattern (absolute) fits, by name; and fitting links whose target is gone.

    Links to files and to directories are followed, as mounted ConfigMaps and the Hub's cache consist of them; a file
    that has several fitting names has the first of them alone. `**` stands for any number of directories. Hidden
    directories fit only a pattern that begins with a dot too, and a part of the pattern that is there under that very
    name is taken by its name.
    """
    files: dict[str, str] = {}
    broken = []
    for path in sorted(set(_matches("/", tuple(part for part in pattern.split("/") if part), ()))):
        if os.path.isfile(path):
            files.setdefault(os.path.realpath(path), path)
        elif os.path.islink(path) and not os.path.exists(path):
            broken.append(path)
    return sorted(files.values()), broken


def _matches(directory: str, parts: tuple[str, ...], above: tuple[str, ...]) -> Iterator[str]:
    """Paths that the parts of a pattern fit below a directory; `above`: real paths that a `**` has come through."""
    part, rest = parts[0], parts[1:]
    if part == "**":
        here = os.path.realpath(directory)
        if rest and here not in above:  # a link to a directory above it would lead round and round
            yield from _matches(directory, rest, ())
            for name in _names(directory):
                if not name.startswith(".") and os.path.isdir(path := os.path.join(directory, name)):
                    yield from _matches(path, parts, (*above, here))
        return
    if not has_magic(part) or os.path.lexists(os.path.join(directory, part)):
        names = [part]
    else:
        names = [name for name in _names(directory) if part.startswith(".") or not name.startswith(".")]
        names = fnmatch.filter(names, part)
    for name in names:
        path = os.path.join(directory, name)
        if not rest:
            yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest, above)


def _names(directory: str) -> list[str]:
    try:
        return os.listdir(directory)
    except OSError:  # no directory, or one that this user may not read
        return []


def _unlisted(error: OSError) -> None:
    if not isinstance(error, FileNotFoundError | NotADirectoryError):
        raise error


def files_below(directory: str) -> dict[str, int]:
    """Every file below a local directory, links followed: its path from there -> bytes; {} where there is none.

    A link to a directory above it leads round and round, one to / through the whole machine: neither is followed.
    Raises OSError for a directory that cannot be listed, whose files would else look lost.
    """
    sizes: dict[str, int] = {}
    top = os.path.realpath(directory)
    seen: set[str] = set()
    for place, directories, names in os.walk(directory, onerror=_unlisted, followlinks=True):
        real = os.path.realpath(place)
        if real in seen or (seen and os.path.commonpath([real, top]) == real):
            directories.clear()
            continue
        seen.add(real)
        for name in names:
            path = os.path.join(place, name)
            try:
                sizes[os.path.relpath(path, directory)] = os.stat(path).st_size
            except FileNotFoundError:  # removed since, or a link to nothing
                continue
    return dict(sorted(sizes.items()))
