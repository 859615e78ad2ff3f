"""The user's cache directory, and directories in it that are made once however many processes ask for them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path

from mipo_ray.errors import UserError

_PARTIAL = ".partial"
# A download writes all the time, and a conversion at its end, half a minute after it began.
_ABANDONED_SECONDS = 3600.0


def cache_dir() -> Path:
    """The directory of everything that can be made again.

    MIPO_RAY_CACHE names it; without that variable it is mipo-ray in the user's cache directory.
    """
    if own := os.environ.get("MIPO_RAY_CACHE"):
        return Path(own).expanduser().absolute()
    user_cache = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(user_cache).expanduser().absolute() / "mipo-ray"


def make_once(directory: Path, make: Callable[[Path], None], is_complete: Callable[[Path], bool]) -> Path:
    """Return `directory`, made first by `make` unless it is there and complete.

    `make` fills an empty directory beside it, which is then renamed: a directory under its own name was finished.
    Processes and threads that ask at the same time wait for the first one where the filesystem has locks. Where it has
    none (NFS often), each fills a directory of its own, and that of the first to finish is used: work is done twice,
    and nothing is lost. What a killed process left is swept an hour after its last write.

    Args:
        directory: the directory wanted, in the cache.
        make: fills the empty directory it is given.
        is_complete: whether an existing `directory` can be used; otherwise it is made again.

    Raises:
        UserError: the cache cannot be written.
    """
    if directory.is_dir() and is_complete(directory):
        return directory
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(
            os.open(directory.parent / f"{directory.name}.lock", os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w"
        )
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the cache cannot be written ({error}); MIPO_RAY_CACHE names another one"
        ) from error
    with lock:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when this process dies
        if directory.is_dir() and is_complete(directory):
            return directory
        partial = _beside(directory)
        try:
            partial.mkdir()
            _sweep(directory, now=partial.stat().st_mtime)
            make(partial)
            _put_in_place(partial, directory, is_complete)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{directory.parent}: no space left for {directory.name}: {error}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory


def _beside(directory: Path) -> Path:
    """A name that no other process makes."""
    return directory.parent / f"{directory.name}.{secrets.token_hex(8)}{_PARTIAL}"


def _put_in_place(partial: Path, directory: Path, is_complete: Callable[[Path], bool]) -> None:
    """Gives a finished directory its name, unless another process gave its own that name meanwhile.

    A damaged one gets its files one by one: another process may be mending it, or reading what it mended.
    """
    try:
        partial.rename(directory)  # never replaces a directory that holds anything
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
        if not is_complete(directory):
            for file in [path for path in partial.rglob("*") if not path.is_dir()]:
                target = directory / file.relative_to(partial)
                target.parent.mkdir(parents=True, exist_ok=True)
                file.replace(target)


def _sweep(directory: Path, now: float) -> None:
    """Removes what killed processes left of `directory`, by the filesystem's own clock: others may be at work."""
    for partial in directory.parent.iterdir():
        if partial.name.startswith(f"{directory.name}.") and partial.name.endswith(_PARTIAL):
            with contextlib.suppress(FileNotFoundError):  # finished meanwhile
                newest = max(path.lstat().st_mtime for path in (partial, *partial.rglob("*")))
                if now - newest > _ABANDONED_SECONDS:
                    shutil.rmtree(partial, ignore_errors=True)
