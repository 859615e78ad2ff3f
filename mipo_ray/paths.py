"""A path or URL as the user wrote it -> a filesystem and the path on it, whatever characters its names have."""

from __future__ import annotations

import atexit
import os
import shutil
import tempfile
from glob import has_magic
from typing import Any

from fsspec.core import url_to_fs
from fsspec.implementations.local import LocalFileSystem


def open_path(url: str) -> tuple[Any, str]:
    """fsspec's filesystem for a local path or a URL, and the path on it; a local one is made absolute.

    Raises what the filesystem's client raises for a URL that it cannot open.
    """
    if "://" in url:
        return url_to_fs(url)
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
