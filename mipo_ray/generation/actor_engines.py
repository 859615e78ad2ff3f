"""The engine of a sampling actor: its own, or one that outlives the stage, in an actor of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import Any

import pyarrow as pa
import ray

from mipo_ray.generation.deaths import Deaths
from mipo_ray.generation.engine import Engine, Sampling, engine_death
from mipo_ray.generation.vllm_arguments import EngineSettings, is_dead_engine
from mipo_ray.monitoring.events import Events
from mipo_ray.monitoring.progress import Tally
from mipo_ray.ray_cluster.living import Lease


@dataclass(frozen=True)
class EngineUse:
    """What a sampling actor needs to have its engine: what the engine is to be, how many GPUs the actor counts
    as reserved for it, and from whom it takes one; None: it starts its own. deaths: see `sampler.Engines`."""

    settings: EngineSettings
    gpus: float
    lease: Lease | None = None
    deaths: Deaths | None = None


class OwnEngine:
    """An engine in the actor itself, which ends with it; `name`: the beginning of the actor's id, by which the Ray
    dashboard finds it."""

    def __init__(self, settings: EngineSettings, events: Events):
        started = time.monotonic()
        self.name = str(ray.get_runtime_context().get_actor_id())[:8]
        self._events = events
        self._tally = Tally(events)
        self._engine = Engine(settings)
        seconds = time.monotonic() - started
        start = {"event": "engine_start", "engine_starts": 1, "engine_start_seconds": seconds}
        events.emit({**start, "engine": self.name})
        events.tell({"event": "ready", "engine": self.name})

    async def respond(self, requests: pa.ChunkedArray, sampling: Sampling) -> pa.Array:
        """See `Engine.respond`."""
        return await self._engine.respond(requests, sampling, self._tally)

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        """See `Engine.score`."""
        return await self._engine.score(rows, window)

    async def probe(self) -> list[float]:
        """See `Engine.probe`."""
        return await self._engine.probe()

    def is_gone(self, error: Exception) -> bool:
        """Whether the error says that the engine's process is gone; the event of its death is written by then."""
        if is_dead_engine(error):
            self._events.emit_and_wait(engine_death(self.name, error))
        return is_dead_engine(error)

    def give_back(self) -> None:
        """Ends the engine."""
        self._engine.shutdown()


class LeasedEngine:
    """An engine that outlives the stage, in an actor of its own (`LivingEngine`); `name` is of that actor."""

    def __init__(self, use: EngineUse, events: Events):
        assert use.lease is not None
        self._of_stage = events, use.deaths
        self._lease = use.lease
        self._actor = use.lease.take()
        self.name = self._actor._actor_id.hex()[:8]
        ray.get(self._actor.hold.remote(use.settings, events))

    async def respond(self, requests: pa.ChunkedArray, sampling: Sampling) -> pa.Array:
        """See `Engine.respond`."""
        responses: pa.Array = await self._actor.respond.remote(requests, sampling, *self._of_stage)
        return responses

    async def score(self, rows: list[list[dict[str, Any]]], window: int) -> list[list[dict[str, Any]]]:
        """See `Engine.score`."""
        scores: list[list[dict[str, Any]]] = await self._actor.score.remote(rows, window, *self._of_stage)
        return scores

    async def probe(self) -> list[float]:
        """See `Engine.probe`."""
        logprobs: list[float] = await self._actor.probe.remote(*self._of_stage)
        return logprobs

    def is_gone(self, error: Exception) -> bool:
        """Whether the error says that the engine's actor is gone, which said so itself."""
        return isinstance(error, ray.exceptions.RayActorError)

    def give_back(self) -> None:
        """Lets another client have the engine."""
        self._lease.give_back()
