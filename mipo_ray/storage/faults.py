"""What went wrong with a disk or an object store: which fault it is, in words, and what to do about it.

Clients of object stores raise errors of their own, or OSErrors that say little; here each becomes one StorageFault that
names the path, what was to be done there, what was found and what helps.
"""

from __future__ import annotations

import contextlib
import errno
from collections.abc import Iterator
from dataclasses import dataclass

from mipo_ray.errors import UserError

_GOES_ON = "the same command then goes on"


class StorageError(UserError):
    """The run directory cannot be used: unwritable, full, in use, damaged, or of another configuration."""


class StorageFault(StorageError):
    """The storage did not do what it was asked, which says nothing about what lies there."""


@dataclass(frozen=True)
class _Kind:
    """A kind of fault, by any of the marks that errors have, and what to do."""

    advice: str
    codes: frozenset[str] = frozenset()
    """Of S3's answers."""
    numbers: frozenset[int] = frozenset()
    """Of an OSError."""
    types: frozenset[str] = frozenset()
    """Names of classes of errors, those that they are made from included; not every client is installed."""
    texts: tuple[str, ...] = ()
    """Of which one is in the message, where a process that handed the error on has lost the rest."""


_NO_BUCKET = _Kind(
    "Make the bucket again or name the one that holds the run; it is not made here, which would begin a new run.",
    codes=frozenset({"NoSuchBucket"}),
    texts=("bucket does not exist",),
)
_FULL = _Kind(
    f"The disk is full: free some space on it (or raise the quota); {_GOES_ON}.",
    numbers=frozenset({errno.ENOSPC, errno.EDQUOT}),
    types=frozenset({"OutOfDiskError"}),
)
_TOO_LARGE = _Kind(
    f"No file may be that large there: raise the limit (ulimit -f) or use another filesystem; {_GOES_ON}.",
    numbers=frozenset({errno.EFBIG}),
)
_REFUSED = _Kind(f"The storage refused it: see its message; {_GOES_ON}.")
# Answers of S3 to a write that is only to be done where nothing is there yet.
_CONDITIONS = frozenset({"PreconditionFailed", "412", "ConditionalRequestConflict", "409"})
# The first that fits. What another kind says more exactly stands before what many errors are made from.
_KINDS = (
    _NO_BUCKET,
    _FULL,
    _TOO_LARGE,
    _Kind(
        f"The clock of this machine is wrong by minutes: set it (NTP); {_GOES_ON}.",
        codes=frozenset({"RequestTimeTooSkewed"}),
        texts=("request time and the current time",),
    ),
    _Kind(
        f"The credentials were refused: every node needs valid ones in its environment; {_GOES_ON}.",
        codes=frozenset({"ExpiredToken", "InvalidAccessKeyId", "InvalidToken", "SignatureDoesNotMatch"}),
        types=frozenset({"NoCredentialsError", "PartialCredentialsError", "CredentialRetrievalError"}),
    ),
    _Kind(
        "Permission was refused: the user, or the credentials of every node, must be allowed to list, read, write and "
        f"delete there (and a store refuses a machine whose clock is wrong by minutes); {_GOES_ON}.",
        codes=frozenset({"AccessDenied", "AllAccessDisabled", "403"}),
        numbers=frozenset({errno.EACCES, errno.EPERM}),
        types=frozenset({"PermissionError"}),
    ),
    _Kind(f"The filesystem can only be read: mount it for writing; {_GOES_ON}.", numbers=frozenset({errno.EROFS})),
    _Kind(
        "The storage did not answer as it should, although it was asked again for some time: see whether it can be "
        f"reached from every node; {_GOES_ON}.",
        codes=frozenset(
            {"SlowDown", "ServiceUnavailable", "InternalError", "RequestTimeout", "500", "502", "503", "504"}
        ),
        numbers=frozenset({errno.EBUSY, errno.EREMOTEIO}),  # as s3fs says some of these codes
        types=frozenset(
            {
                *("ConnectionError", "TimeoutError", "HTTPClientError", "EndpointConnectionError"),
                *("IncompleteReadError", "ResponseStreamingError", "FSTimeoutError", "ClientError", "BotoCoreError"),
            }
        ),
    ),
    _Kind(
        f"The disk, or the machine that serves it, failed: the kernel's log (dmesg) says more; {_GOES_ON}.",
        numbers=frozenset({errno.EIO, errno.ESTALE, errno.EHOSTDOWN, errno.ENOTCONN}),
    ),
)


@contextlib.contextmanager
def named(path: str, done: str) -> Iterator[None]:
    """For one operation on a path: raises StorageFault for a fault of storage. done: as in "cannot be written".

    A file that is not there stays a FileNotFoundError, and what is no fault of storage what it is.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        if (kind := _kind_of(error)) is None or (isinstance(error, FileNotFoundError) and kind is not _NO_BUCKET):
            raise
        raise StorageFault(f"{path.rstrip('/')}: cannot be {done}: {_found(error)}. {kind.advice}") from error


def advice_on(error: BaseException) -> str:
    """What to do about a fault of storage, to be put behind what was found; "" for any other error."""
    kind = _kind_of(error)
    return "" if kind is None else f". {kind.advice}"


def is_bucket_gone(error: BaseException) -> bool:
    """Whether a bucket is not there, and not only a file in it."""
    return _kind_of(error) is _NO_BUCKET


def full_disk(error: BaseException) -> str | None:
    """What to say of a disk that is full where that is what an error comes from, whoever met it; else None."""
    for each in _causes(error):
        if (kind := _kind_of(each)) in (_FULL, _TOO_LARGE) and kind is not None:
            return f"{_found(each)}. {kind.advice}"
    return None


def _kind_of(error: BaseException) -> _Kind | None:
    code = _code(error)
    number = error.errno if isinstance(error, OSError) else None
    names = {each.__name__ for each in type(error).__mro__}
    for kind in _KINDS:
        if (
            code in kind.codes
            or number in kind.numbers
            or names & kind.types
            or any(text in str(error) for text in kind.texts)
        ):
            return kind
    if code in _CONDITIONS or isinstance(error, FileNotFoundError | IsADirectoryError):
        return None
    return _REFUSED if code or isinstance(error, OSError) else None


def _code(error: BaseException) -> str:
    """S3's name of what it found, "" where there is none."""
    for each in (error, error.__cause__):
        answer = getattr(each, "response", None)
        if isinstance(answer, dict):
            return str(answer.get("Error", {}).get("Code", ""))
    return ""


def _found(error: BaseException) -> str:
    text = str(error).strip().rstrip(".") or "no answer"
    if isinstance(error, OSError) and error.errno is not None and error.filename is not None and not _code(error):
        return f"[Errno {error.errno}] {error.strerror}"
    return f"{_code(error) or type(error).__name__}: {text}" if _code(error) or "Errno" not in text else text


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = getattr(error, "cause", None) or error.__cause__
