"""The user's cache directory, and directories in it that are made once however many processes ask for them."""

from __future__ import annotations

import errno
import fcntl
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from mipo_ray.errors import UserError


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
    Processes and threads that ask at the same time wait for the first one. What a killed process left is swept.

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
        fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when this process dies
        if directory.is_dir() and is_complete(directory):
            return directory
        partial = directory.parent / f"{directory.name}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            partial.mkdir()
            make(partial)
            shutil.rmtree(directory, ignore_errors=True)
            partial.rename(directory)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise UserError(f"{directory.parent}: no space left for {directory.name}: {error}") from error
            raise
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    return directory
