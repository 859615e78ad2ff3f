"""Files of a run directory on a local disk, where others may have put links."""

from __future__ import annotations

import errno
import os
from typing import IO


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
