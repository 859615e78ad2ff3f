"""Files of a run directory on a local disk, where others may have put links."""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
from typing import IO

WRITING = ".writing"  # suffix of a file that is not complete yet


def new_file(path: str, mode: int = 0o666) -> IO[bytes]:
    """A file that was not there before, open for writing: an existing one, or a link in its place, is an OSError.

    Its name should be one that nobody else can foresee. mode: its permissions, from which the umask is taken.
    """
    return os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, mode), "wb")


def where_to_make(path: str) -> tuple[str, str]:
    """The nearest directory above `path`, or it, that is there, and why nothing can be made in it ("": it can be)."""
    while not os.path.lexists(path):
        path = os.path.dirname(path)
    if not os.path.isdir(path):
        return path, os.strerror(errno.ENOTDIR)
    return path, "" if os.access(path, os.W_OK | os.X_OK) else os.strerror(errno.EACCES)


def append_whole(path: str, text: str) -> None:
    """Appends to a file, which an OSError leaves as it was: what is appended again would else be there by half, too."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        before = os.fstat(file.fileno()).st_size
        rest = memoryview(text.encode("utf-8"))
        try:
            while rest:
                rest = rest[file.write(rest) :]
        except OSError:
            with contextlib.suppress(OSError):
                file.truncate(before)
            raise


def write_whole(path: str, text: str, mode: int) -> None:
    """Writes a file in one go, through a temporary one beside it, which an OSError leaves no trace of."""
    os.makedirs(os.path.dirname(path), exist_ok=True)
    temporary = f"{path}.{secrets.token_hex(8)}{WRITING}"
    try:
        with new_file(temporary, mode) as file:
            file.write(text.encode("utf-8"))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except OSError:
        with contextlib.suppress(OSError):
            os.remove(temporary)
        raise
