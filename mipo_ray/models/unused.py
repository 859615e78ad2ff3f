"""Fetched models that nobody uses any more, taken out of the cache: a run brings a policy to its nodes each round."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import shutil
from dataclasses import dataclass
from pathlib import Path

from mipo_ray.errors import UserError
from mipo_ray.models.cache import PARTIAL, is_abandoned

LIMIT = "MIPO_RAY_CACHE_GIB"
_FETCHED = re.compile(r"[0-9a-f]{24}")  # how `source` names what it fetches; what is converted here stays
_UNUSED_SECONDS = 7 * 24 * 3600.0
# What was asked for so lately may be being read.
_IN_USE_SECONDS = 24 * 3600.0
_SPARE_BYTES = 1024**3


@dataclass(frozen=True)
class _Fetched:
    directory: Path
    size: int  # bytes
    used: float  # seconds, by the clock of its filesystem


def note_use(directory: Path) -> None:
    """Says that a fetched model is used now; does nothing where it is not there, or is another user's."""
    with contextlib.suppress(OSError):
        os.utime(directory)


def make_room(models: Path, needed: int, now: float) -> None:
    """Takes fetched models out of `models` before `needed` more bytes come, those that were not used for longest first.

    What was not used for a week goes. What was used since goes only while there is more than MIPO_RAY_CACHE_GIB allows,
    or the disk has no room; what was used within the last day stays. Also gone is what killed processes left half
    fetched, an hour after its last write.

    now: seconds, by the clock of the filesystem.

    Raises:
        UserError: MIPO_RAY_CACHE_GIB is no number.
    """
    limit = _limit()
    for partial in models.glob(f"*{PARTIAL}"):
        if is_abandoned(partial, now):
            shutil.rmtree(partial, ignore_errors=True)
    fetched = sorted(_fetched(models), key=lambda one: one.used)
    held = sum(one.size for one in fetched)
    for one in fetched:
        unused = now - one.used
        is_too_much = held + needed > limit or shutil.disk_usage(models).free < needed + _SPARE_BYTES
        if unused > _UNUSED_SECONDS or (unused > _IN_USE_SECONDS and is_too_much):
            _remove(one.directory)
            held -= one.size


def _limit() -> float:
    text = os.environ.get(LIMIT) or "inf"
    try:
        limit = float(text)
    except ValueError:
        limit = float("nan")
    if not limit > 0:
        raise UserError(f"environment variable {LIMIT}: expected a number of GiB above 0, found {text!r}")
    return limit * 1024**3


def _fetched(models: Path) -> list[_Fetched]:
    found = []
    for directory in models.iterdir():
        if _FETCHED.fullmatch(directory.name) and directory.is_dir():
            with contextlib.suppress(OSError):  # removed by another process, or of another user
                size = sum(file.stat().st_size for file in directory.iterdir())
                found.append(_Fetched(directory, size, directory.stat().st_mtime))
    return found


def _remove(directory: Path) -> None:
    """Takes its name away first: half of a model is never found under it."""
    going = directory.parent / f"{directory.name}.{secrets.token_hex(8)}{PARTIAL}"
    with contextlib.suppress(OSError):  # another process was faster, or it is another user's
        directory.rename(going)
        shutil.rmtree(going, ignore_errors=True)
