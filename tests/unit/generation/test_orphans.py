"""What an engine started goes with the process that started it, also where that is killed.

python -m pytest tests/unit/generation/test_orphans.py
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable

import pytest

from mipo_ray.generation.orphans import OrphanGuard

# An actor with an engine: starts a process that lasts, guards it, says both their numbers, and waits.
ACTOR = """
import os, subprocess, sys, time
from mipo_ray.generation.orphans import OrphanGuard
core = subprocess.Popen(["sleep", "300"])
guard = OrphanGuard([core.pid])
print(core.pid, flush=True)
time.sleep(300)
"""


def is_there(process: int) -> bool:
    """Whether a process runs; one that ended and that nobody has asked for yet does not."""
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def within(seconds: float, condition: Callable[[], bool]) -> bool:
    deadline = time.monotonic() + seconds
    while not condition() and time.monotonic() < deadline:
        time.sleep(0.02)
    return condition()


def test_a_core_ends_with_its_actor_that_is_killed() -> None:
    actor = subprocess.Popen([sys.executable, "-c", ACTOR], stdout=subprocess.PIPE, text=True)
    assert actor.stdout is not None
    core = int(actor.stdout.readline())
    try:
        time.sleep(0.2)
        assert is_there(core)
        os.kill(actor.pid, signal.SIGKILL)
        actor.communicate()
        assert within(10, lambda: not is_there(core))
    finally:
        if is_there(core):
            os.kill(core, signal.SIGKILL)


def test_a_guard_that_is_dismissed_kills_nothing() -> None:
    core = subprocess.Popen(["sleep", "300"])
    try:
        guard = OrphanGuard([core.pid])
        guard.dismiss()
        guard.dismiss()
        time.sleep(0.2)
        assert core.poll() is None
    finally:
        core.kill()
        core.wait()


@pytest.mark.parametrize("count", [1, 3])
def test_all_that_it_is_told_of_end_when_the_pipe_closes(count: int) -> None:
    cores = [subprocess.Popen(["sleep", "300"]) for _ in range(count)]
    guard = OrphanGuard([core.pid for core in cores])
    guard._guard.communicate(timeout=10)  # closes the pipe, as the end of this process would
    assert [core.wait(timeout=10) for core in cores] == [-signal.SIGKILL] * count
