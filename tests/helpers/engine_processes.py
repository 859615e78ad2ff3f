"""The vLLM engines of the cluster that a test is connected to, and the actors that keep them."""

from __future__ import annotations

import functools
import os
import time
from pathlib import Path
from typing import Any

import ray
from ray.util.state import list_actors

SECONDS_TO_END = 30


def engine_processes() -> set[int]:
    """Process ids of the vLLM engines that actors of this cluster started, whether those actors still live or not."""
    mark = f"RAY_RAYLET_PID={_raylet(ray.get_runtime_context().gcs_address)}".encode()
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        try:
            environment = (process / "environ").read_bytes().split(b"\0")
            if mark in environment and b"EngineCore" in (process / "cmdline").read_bytes():
                found.add(int(process.name))
        except OSError:  # gone meanwhile, or another user's
            continue
    return found


@functools.lru_cache(maxsize=1)
def _raylet(address: str) -> str:
    """The process id of the node's raylet, which its workers inherit in their environment, and their engines."""
    here: Any = ray.remote(num_cpus=0)(lambda: os.environ["RAY_RAYLET_PID"])
    return str(ray.get(here.remote()))


def living_actors() -> list[Any]:
    """The actors with engines and scorers that outlive a stage which are not dead yet."""
    address = ray.get_runtime_context().gcs_address
    names = ("LivingEngine", "LivingScorer")
    found = [actor for name in names for actor in list_actors(address=address, filters=[("class_name", "=", name)])]
    return [actor for actor in found if actor.state != "DEAD"]


def wait_until_nothing_is_left() -> None:
    """For the end of a run: its engines' processes and actors are gone in time."""
    deadline = time.monotonic() + SECONDS_TO_END
    while (left := engine_processes()) or living_actors():
        assert time.monotonic() < deadline, (left, living_actors())
        time.sleep(0.2)
