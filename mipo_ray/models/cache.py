"""The user's cache directory, and directories in it that are made once however many processes ask for them."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import os
import secrets
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from mipo_ray.errors import UserError

PARTIAL = ".partial"
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


def make_once(
    directory: Path, make: Callable[[Path], None], is_complete: Callable[[Path], bool], *, goes_on: bool = False
) -> Path:
    """Return `directory`, made first by `make` unless it is there and complete.

    `make` fills an empty directory beside it, which is then renamed: a directory under its own name was finished.
    Processes and threads that ask at the same time wait for the first one where the filesystem has locks. Where it has
    none (NFS often), each fills a directory of its own, and that of the first to finish is used: work is done twice,
    and nothing is lost. What a killed process left is swept an hour after its last write.

    Args:
        directory: the directory wanted, in the cache.
        make: fills the empty directory it is given.
        is_complete: whether an existing `directory` can be used; otherwise it is made again.
        goes_on: `make` may be given a directory in which an earlier call was cut off, by an error or a kill, and then
            goes on with what is there. Where locks do not work it always begins anew.

    Raises:
        UserError: the cache cannot be written.
    """
    if directory.is_dir() and is_complete(directory):
        return directory
    lock_file = directory.parent / f"{directory.name}.lock"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        lock = os.fdopen(os.open(lock_file, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW, 0o666), "w")
    except OSError as error:
        raise UserError(
            f"{directory.parent}: the cache cannot be written ({error}); MIPO_RAY_CACHE names another one"
        ) from error
    with lock:
        with contextlib.suppress(OSError):  # a filesystem without locks
            fcntl.flock(lock, fcntl.LOCK_EX)  # the kernel releases it when this process dies
        if directory.is_dir() and is_complete(directory):
            return directory
        with _workplace(directory, lock_file, goes_on) as partial:
            make(partial)
            _put_in_place(partial, directory, is_complete)
    return directory


@contextlib.contextmanager
def _workplace(directory: Path, lock: Path, goes_on: bool) -> Iterator[Path]:
    """A directory beside `directory` to make it in; where `goes_on`, what was left of one, and left again by an error.

    lock: the file whose lock this process has, where there are locks.
    """
    partial = _cut_off(directory, lock) if goes_on else None
    if partial is None:
        partial = directory.parent / f"{directory.name}.{_machine()}{secrets.token_hex(8)}{PARTIAL}"  # nobody else's
        partial.mkdir()
    handle = os.open(partial, os.O_RDONLY)
    is_left = False
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)  # by which `_cut_off` knows that it is worked in
        os.utime(partial)
        _sweep(directory, now=partial.stat().st_mtime)
        yield partial
    except BaseException as error:
        is_full = isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT)
        is_left = goes_on and not is_full
        if is_full:
            raise UserError(f"{directory.parent}: no space left for {directory.name}: {error}") from error
        raise
    finally:
        os.close(handle)
        if not is_left:
            shutil.rmtree(partial, ignore_errors=True)


def _cut_off(directory: Path, lock: Path) -> Path | None:
    """Where a process of this machine worked on `directory` and surely does so no longer: it had a lock there, and
    locks work here; those of other machines may be seen by these alone."""
    if not _is_locked(lock):
        return None
    own = [path for path in sorted(_partials(directory)) if path.name.startswith(f"{directory.name}.{_machine()}")]
    return next((partial for partial in own if not _is_locked(partial)), None)


def _machine() -> str:
    """Names the running kernel, 8 hex digits; where it has no name a random one."""
    try:
        name = Path("/proc/sys/kernel/random/boot_id").read_bytes()
    except OSError:
        name = secrets.token_bytes(8)
    return hashlib.sha256(name).hexdigest()[:8]


def _is_locked(path: Path) -> bool:
    """Whether anybody, this process too, has a file or directory locked: no where a filesystem has no locks."""
    handle = os.open(path, os.O_RDONLY)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(handle)
    return False


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


def _partials(directory: Path) -> list[Path]:
    """Where processes work on `directory`, or did."""
    names = (f"{directory.name}.", PARTIAL)
    return [
        path for path in directory.parent.iterdir() if path.name.startswith(names[0]) and path.name.endswith(names[1])
    ]


def _sweep(directory: Path, now: float) -> None:
    """Removes what killed processes left of `directory`, by the filesystem's own clock: others may be at work."""
    for partial in _partials(directory):
        if is_abandoned(partial, now):
            shutil.rmtree(partial, ignore_errors=True)


def is_abandoned(partial: Path, now: float) -> bool:
    """Whether nobody has written below a directory for so long that nobody will; `now`: seconds, by its filesystem."""
    try:
        return now - max(path.lstat().st_mtime for path in (partial, *partial.rglob("*"))) > _ABANDONED_SECONDS
    except FileNotFoundError:  # finished meanwhile
        return False
