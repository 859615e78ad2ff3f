"""The files of a remote directory, brought to this machine's disk: several at a time, and gone on with after a cut."""

from __future__ import annotations

import base64
import hashlib
import os
import re
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

from mipo_ray.errors import UserError
from mipo_ray.models.directory import ModelDirectory

_FILES_AT_ONCE = 8
# Bytes read at a time, of each file.
_BLOCK = 16 * 1024**2
_MD5 = re.compile(r"[0-9a-f]{32}")


def fetch(remote: ModelDirectory, names: Sequence[str], local: Path) -> None:
    """Brings files of `remote` to `local`, where parts of them may be from an earlier call that was cut off; anything
    else that is there goes.

    A file has the size that was listed then, and the MD5 sum where the filesystem knows one.

    Raises:
        UserError: a file ended before its size, or came with another sum; what came of it is removed.
    """
    for path in local.iterdir():
        if path.name not in names:
            path.unlink()
    stopped = threading.Event()
    with ThreadPoolExecutor(_FILES_AT_ONCE) as pool:
        # The largest first: else one of them might begin when all others are there.
        largest_first = sorted(names, key=remote.size, reverse=True)
        fetched = [pool.submit(_fetch_whole, remote, name, local / name, stopped) for name in largest_first]
        try:
            ended, _ = wait(fetched, return_when=FIRST_EXCEPTION)
        finally:
            stopped.set()
    for one in ended:
        one.result()


def _fetch_whole(remote: ModelDirectory, name: str, path: Path, stopped: threading.Event) -> None:
    _fetch(remote, name, path, stopped)
    if stopped.is_set() or (expected := known_md5(remote.details[name])) is None:
        return
    if (found := _md5(path)) == expected:
        return
    # What S3 calls a file is no sum of it where the store encrypts by a key of its own (SSE-KMS): the same bytes come
    # again then.
    path.unlink()
    _fetch(remote, name, path, stopped)
    if not stopped.is_set() and (again := _md5(path)) not in (expected, found):
        path.unlink()
        raise UserError(
            f"{remote.shown}/{name}: expected the MD5 sum {expected} as listed, downloaded {found} and then {again}"
        )


def _fetch(remote: ModelDirectory, name: str, path: Path, stopped: threading.Event) -> None:
    """Appends to a file what it lacks, block by block; returns early when `stopped`."""
    size = remote.size(name)
    with path.open("ab") as file:
        if file.tell() > size:
            file.truncate(0)
            file.seek(0)
        while (start := file.tell()) < size and not stopped.is_set():
            block = remote.read(name, start, min(start + _BLOCK, size))
            file.write(block)
            file.flush()
            if not block:
                break
        os.fsync(file.fileno())  # a machine that is lost must not leave a file of its size without its content
    if not stopped.is_set() and (found := path.stat().st_size) != size:
        path.unlink()
        raise UserError(
            f"{remote.shown}/{name}: expected {size} bytes as listed, downloaded {found}: it changed meanwhile"
        )


def known_md5(details: Mapping[str, Any]) -> str | None:
    """The MD5 sum in hex, where an object store's details of a file have one: Google's say it, S3's ETag is it for a
    file that was uploaded in one part."""
    if encoded := details.get("md5Hash"):
        return base64.b64decode(encoded).hex()
    tag = str(details.get("ETag") or "").strip('"')
    return tag if _MD5.fullmatch(tag) else None


def _md5(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, lambda: hashlib.md5(usedforsecurity=False)).hexdigest()
