"""Who may write a run directory: one process at a time."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace

from mipo_ray.errors import UserError
from mipo_ray.stop_signals import thread_beside
from mipo_ray.storage.faults import StorageFault, named
from mipo_ray.storage.records import read_record, to_json
from mipo_ray.storage.run_directory import RunDirectory, StorageError
from mipo_ray.terminal import say

HEARTBEAT_SECONDS = 10.0
STALE_LOCK_SECONDS = 60.0
UNREADABLE_LOCK_SECONDS = 1.0
LOOK_SECONDS = 1.0


@dataclass(frozen=True)
class Lock:
    """What lock.json holds: who writes the run directory, and that it still did so."""

    host: str
    """The machine and, where containers share its name, the container."""
    pid: int
    """The process, of that host."""
    process_start: int | None
    """When it started, in clock ticks since boot, so that a reused pid is not taken for it; None: not to be told."""
    heartbeat: float
    """When it last said that it lives: seconds since the epoch."""


@contextlib.contextmanager
def hold_lock(run: RunDirectory) -> Iterator[None]:
    """Holds the run directory against a second process; raises StorageError when another one holds it.

    The lock is an object with a heartbeat. Where another process has it although this one did not give it up (this
    host, or the way to its storage, stood still for longer than STALE_LOCK_SECONDS), the block is interrupted as by
    Ctrl-C and ends with StorageError; `check_locks` finds it out sooner.

    One of a dead process on this host is taken over at once (and one of a
    living process never), one of another host when its heartbeat is older than STALE_LOCK_SECONDS. A younger one may be
    that of a host that has just died: its next beat is waited for, for at most STALE_LOCK_SECONDS.
    """
    owner = Lock(host=_host(), pid=os.getpid(), process_start=_process_start(os.getpid()), heartbeat=time.time())
    _acquire(run, owner)

    def beat(stop: threading.Event) -> None:
        while not stop.wait(HEARTBEAT_SECONDS):
            # Storage that fails for a moment must not end the heartbeat; the next beat tries again.
            with contextlib.suppress(Exception):
                if _holds_lock(run, owner):
                    run.write_text("lock.json", _content(owner))
                elif _taken_over(run, owner) is not None:
                    signal.pthread_kill(threading.main_thread().ident or 0, signal.SIGINT)
                    return

    _held[run] = owner
    try:
        with thread_beside(beat, "run-directory-heartbeat"):
            yield
    except KeyboardInterrupt:
        check_locks()
        raise
    finally:
        del _held[run]
        # What is left of it where storage does not answer is a dead process's, which the next one takes over.
        with contextlib.suppress(FileNotFoundError, StorageError), named(run.path("lock.json"), "removed"):
            if _holds_lock(run, owner):
                run.filesystem.rm_file(run.path("lock.json"))


# The locks of this process: what asks before it commits need not be handed them.
_held: dict[RunDirectory, Lock] = {}


def check_locks() -> None:
    """Raises StorageError where another process has taken over a run directory that this one holds, since it stood
    still for too long: what it would write now is the other's to write."""
    for run, owner in _held.items():
        if (other := _taken_over(run, owner)) is not None:
            raise StorageError(
                f"{run.url}: process {other.pid} on {other.host} took this run directory over, since this process or "
                f"its storage stood still for more than {STALE_LOCK_SECONDS:.0f} s. This process stops; the other one "
                "goes on with the run."
            )


def _taken_over(run: RunDirectory, owner: Lock) -> Lock | None:
    """The lock of another process where it is in the place of `owner`'s; None where that, or none, is there."""
    found = _read_lock(run)
    return None if found is None or _is_of(found, owner) else found


def _acquire(run: RunDirectory, owner: Lock) -> None:
    # Exclusive creation decides between two processes that start at the same moment.
    try:
        _create_lock(run, owner)
        return
    except OSError:  # "exists", which not every object store's client says with FileExistsError
        if run.read_text("lock.json") is None:
            with named(run.path("lock.json"), "written"):
                raise
        if _read_lock(run) == owner:  # the answer to a write that was done got lost, and the client wrote again
            return
    held = _read_lock(run)
    # Another process creates the file a moment before it fills it; a killed one never fills it.
    deadline = time.monotonic() + UNREADABLE_LOCK_SECONDS
    while held is None and time.monotonic() < deadline:
        time.sleep(0.05)
        held = _read_lock(run)
    if held is None:
        pass  # of a killed process
    elif held.host == owner.host and held.process_start is not None:
        if _process_start(held.pid) == held.process_start:
            raise _in_use(run, held)
    elif _age(held) < STALE_LOCK_SECONDS:
        _await_end(run, held)
        if run.read_text("lock.json") is None:  # given up by a process that lived
            return _acquire(run, replace(owner, heartbeat=time.time()))
    run.write_text("lock.json", _content(owner))
    # Two processes may take over the same dead lock: the one that wrote last keeps it.
    time.sleep(0.5)
    if not _holds_lock(run, owner):
        raise StorageError(f"{run.url}: another process took over this run directory at the same moment")


def _await_end(run: RunDirectory, held: Lock) -> None:
    """Returns when the lock is given up or stale; raises StorageError when it shows that its process lives."""
    # The clock of the other host may be ahead, and the heartbeat to come.
    age = max(0.0, _age(held))
    say(
        f"{run.url}: process {held.pid} on {held.host} held this run directory {age:.0f} s ago; "
        f"waiting up to {STALE_LOCK_SECONDS - age:.0f} s to see whether it still does",
    )
    deadline = time.monotonic() + STALE_LOCK_SECONDS - age
    while time.monotonic() < deadline:
        time.sleep(LOOK_SECONDS)
        if run.read_text("lock.json") is None:
            return
        found = _read_lock(run)  # None in the moment in which it is written anew
        if found and found != held:
            raise _in_use(run, found)


def _in_use(run: RunDirectory, held: Lock) -> StorageError:
    return StorageError(
        f"{run.url}: in use by process {held.pid} on {held.host} (heartbeat {_age(held):.0f} s ago). "
        "Two processes cannot share a run directory; stop that one or choose another run_dir."
    )


def _age(held: Lock) -> float:
    """Seconds since the lock's last heartbeat."""
    return time.time() - held.heartbeat


def _read_lock(run: RunDirectory) -> Lock | None:
    """What lock.json holds; None where it is not there or not complete. Raises StorageFault where it cannot be told."""
    try:
        return read_record(Lock, run.read_text("lock.json") or "", run.path("lock.json"))
    except StorageFault:
        raise
    except UserError:
        return None


def _holds_lock(run: RunDirectory, owner: Lock) -> bool:
    held = _read_lock(run)
    return held is not None and _is_of(held, owner)


def _is_of(held: Lock, owner: Lock) -> bool:
    return replace(held, heartbeat=owner.heartbeat) == owner


def _content(owner: Lock) -> str:
    return json.dumps(to_json(replace(owner, heartbeat=time.time())))


def _create_lock(run: RunDirectory, owner: Lock) -> None:
    content = json.dumps(to_json(owner))
    if run.is_local:  # fsspec's local "create" mode is a check followed by a write
        with open(run.path("lock.json"), "x", encoding="utf-8") as file:
            file.write(content)
    else:
        run.filesystem.pipe_file(run.path("lock.json"), content.encode(), mode="create")


def _host() -> str:
    """Names what process ids are unique in: the machine and, where containers share its name, the container."""
    with contextlib.suppress(OSError):
        return f"{socket.gethostname()} {os.readlink('/proc/self/ns/pid')}"
    return socket.gethostname()


def _process_start(pid: int) -> int | None:
    """Start time of a process in clock ticks since boot (so that a reused pid is not taken for it); None: it is gone.

    A killed process that its parent has not reaped (state Z) is gone: it does nothing any more.
    """
    try:
        with open(f"/proc/{pid}/stat", encoding="utf-8", errors="replace") as file:
            status = file.read().rsplit(")", 1)[1].split()
    except OSError:
        return None
    return None if status[0] in "ZX" else int(status[19])
